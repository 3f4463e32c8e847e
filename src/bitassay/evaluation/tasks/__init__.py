"""Questions with answers, as lm-eval asks them: `registry.py` lists the tasks."""

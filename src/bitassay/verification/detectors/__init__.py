"""What reduces a claimed run to evidence: one file a detector, `registry.py` lists them."""

"""The INT8/FP8 studies: task3.1 to task3.3 (docs/sources.md)."""

"""Recipes applied to a model: `pipeline.py` is the one order of steps, the folders are the steps."""

"""Corpora, task items and prompts: where texts come from."""

"""Codes that know the inputs of their matrix: GPTQ, learned, tuned, low-rank, mixed bits."""

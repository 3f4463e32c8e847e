"""Rounding at run time of what enters a linear (activations) and of the KV cache."""

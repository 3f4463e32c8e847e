"""Checkpoint layouts: compressed-tensors, our own, GGUF; saving and reading them."""

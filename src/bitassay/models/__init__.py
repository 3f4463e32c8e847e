"""Find, open and walk a causal language model; its identity."""

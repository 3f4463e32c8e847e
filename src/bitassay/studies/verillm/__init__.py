"""The VeriLLM experiments: exp1 to exp5 and separability (docs/sources.md)."""

"""Several verifiers that do not trust each other."""

"""Which recipe is best: a search over what recipes can say, for several objectives and within limits."""

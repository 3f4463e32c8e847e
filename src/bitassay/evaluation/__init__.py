"""How far a model is from its base: perplexity, divergence, tasks, generated text, intervals."""

"""Speed and memory: models, products, the limits of the machine."""

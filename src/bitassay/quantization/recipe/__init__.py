"""What a recipe can say: frozen specs and number formats, no algorithm."""

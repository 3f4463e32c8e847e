"""Layers and matrices that run more than once, and the controls they are compared with."""

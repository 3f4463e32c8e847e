"""Tiny models of every architecture, for tests."""

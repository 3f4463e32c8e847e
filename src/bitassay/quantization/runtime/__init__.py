"""Modules and products that compute with codes."""

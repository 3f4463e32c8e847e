"""Servers: one that can be audited, and the audit of any endpoint of the OpenAI kind."""

"""Signed commitments to a trace, challenges and openings."""

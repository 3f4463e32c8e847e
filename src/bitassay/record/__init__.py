"""Run folders, digests, files that are whole or absent, processes."""

"""The studies of layer replication (docs/sources.md)."""

"""Whoever runs a model: `ENGINES` by name, `Engine` what each can be asked."""

from bitassay.engines.engine import ENGINES, Engine

__all__ = ["ENGINES", "Engine"]

"""Calibration text, which takes longer to tokenize than these models to quantize, is read once."""

from functools import cache

import pytest

from bitassay.quantize import pipeline
from bitassay.quantize.calibration import calibration_tokens
from bitassay.testing.tiny import stories260k


@cache
def windows(spec):
    return calibration_tokens(stories260k(), spec)


@pytest.fixture(autouse=True)
def _text_is_read_once(monkeypatch):
    monkeypatch.setattr(pipeline, "calibration_tokens", lambda model, spec: windows(spec))

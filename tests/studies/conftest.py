"""Fixtures of the studies."""

import pytest

from workers import in_process


@pytest.fixture
def started(monkeypatch):
    """Jobs are done in this process; the names of those that were started."""
    return in_process(monkeypatch)

"""Fixtures of the studies."""

import pytest

from bitassay.studies.verillm import work
from workers import InProcess


@pytest.fixture
def started(monkeypatch):
    """The jobs that were started, by the names of their files."""
    monkeypatch.setattr(work, "Popen", InProcess)
    monkeypatch.setattr(InProcess, "started", [], raising=False)
    return InProcess.started

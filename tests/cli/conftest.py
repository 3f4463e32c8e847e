"""Run the command line in this process: exit status, stdout, stderr."""

from types import SimpleNamespace

import pytest

from bitassay import cli
from bitassay.bench import workload
from workers import in_process


@pytest.fixture
def bitassay(capsys):
    """Call it with the words of a command line."""

    def call(*words, debug=False):
        capsys.readouterr()
        status = cli.run(list(words), debug)
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)

    return call


@pytest.fixture
def workers_here(monkeypatch):
    """Jobs are done in this process, on a machine that is known; the names of those that were started."""
    monkeypatch.setattr(workload, "machine_limits", lambda _: {"bandwidth": 1e9, "peaks": {"bfloat16": 1e9}})
    return in_process(monkeypatch)

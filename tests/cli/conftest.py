"""Run the command line in this process: exit status, stdout, stderr."""

from types import SimpleNamespace

import pytest

from bitassay import cli
from bitassay.bench import models
from bitassay.bench.worker import model_timer
from bitassay.studies import crew
from bitassay.studies.cells import Bench


@pytest.fixture
def bitassay(capsys):
    """Call it with the words of a command line."""

    def call(*words, debug=False):
        capsys.readouterr()
        status = cli.run(list(words), debug)
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)

    return call


class InProcess:
    """A bench's worker that is none, on a machine that is known."""

    def __init__(self, name, job, folder, progress):
        runner = model_timer(job, progress)
        self.facts, self.measure = runner.facts, runner.measure
        self.limits = lambda: {"bandwidth": 1e9, "peaks": {"bfloat16": 1e9}}
        self.stop = lambda: None


@pytest.fixture
def timed_here(monkeypatch):
    """Models are timed in this process."""
    monkeypatch.setattr(models, "Worker", InProcess)


@pytest.fixture
def cells_here(monkeypatch):
    """Cells of a study are done in this process."""

    def in_process(folder, cells, *_):
        bench = Bench(folder.plan)
        for cell in cells:
            bench.work(cell, folder)

    monkeypatch.setattr(crew, "run_local", in_process)

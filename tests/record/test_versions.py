"""The digest of the code: of what makes results, and of nothing else."""

from importlib.metadata import version
from pathlib import Path

import pytest

from bitassay.record.versions import ROOT, source_digest, versions


def changed(monkeypatch, name):
    """The package's version with one more line in one of its files."""
    real = Path.read_text
    with monkeypatch.context() as patched:
        patched.setattr(
            Path,
            "read_text",
            lambda path, *a, **k: real(path, *a, **k) + "# more" * (path == ROOT / name),
        )
        return versions()["bitassay"]


@pytest.mark.parametrize(
    "name", ["quantization/solvers/gptq.py", "studies/cells.py", "data/windows.py", "record/run.py"]
)
def test_code_that_makes_results_counts(monkeypatch, name):
    before = versions()["bitassay"]
    assert before.startswith(f"{version('bitassay')}+")
    assert (ROOT / name).exists()
    assert changed(monkeypatch, name) != before


@pytest.mark.parametrize("name", ["cli/study.py", "report/tables.py"])
def test_what_shows_results_does_not(monkeypatch, name):
    assert (ROOT / name).exists()
    assert changed(monkeypatch, name) == versions()["bitassay"]


def test_of_some_folders():
    assert source_digest("engines") != source_digest("engines", "data")
    assert versions("torch") == versions() | {"torch": version("torch")}

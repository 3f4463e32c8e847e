"""`bitassay doctor`."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from bitassay import cli
from bitassay.bench import doctor


def findings(done):
    return {row["subject"]: row for row in json.loads(done.out)["rows"]}


def test_a_machine_that_can(bitassay):
    """The tests run, so everything that is needed is here."""
    done = bitassay("doctor", "--format", "json")
    found = findings(done)
    assert (done.status, done.err) == (0, "")
    assert found["torch"]["found"] == metadata.version("torch")
    assert found["torch"]["needed"].startswith(">=")
    assert {f"verb {verb}" for verb in cli.VERBS} - set(found) == {"verb doctor"}
    assert all(row["status"] in ("ok", "warning") for row in found.values())


def test_the_table_has_a_line_for_each(bitassay):
    done = bitassay("doctor")
    assert len(done.out.splitlines()) == 2 + len(findings(bitassay("doctor", "--format", "json")))


def test_a_missing_package(bitassay, monkeypatch):
    version = metadata.version

    def without_scipy(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_scipy)
    done = bitassay("doctor", "--format", "json")
    found = findings(done)
    assert done.status == 3
    assert (found["scipy"]["status"], found["scipy"]["found"]) == ("missing", "not installed")
    assert found["scipy"]["remedy"] == f'pip install "scipy{found["scipy"]["needed"]}"'
    assert found["verb eval"]["found"] == "cannot run: scipy"
    assert found["verb report"]["found"] == "can run"
    assert "missing: scipy: not installed" in done.err


def test_a_package_that_is_too_old(bitassay, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "2.12.1" if name == "torch" else version(name)
    )
    done = bitassay("doctor", "--format", "json")
    assert done.status == 3
    assert findings(done)["torch"]["status"] == "missing"
    assert "torch" in findings(done)["verb prove"]["found"]


def test_a_cache_folder_that_cannot_be_written(bitassay, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", "/proc/bitassay")
    done = bitassay("doctor", "--format", "json")
    found = findings(done)
    assert done.status == 3
    assert found["cache folder"]["found"].startswith("/proc/bitassay: not writable")
    assert "cache folder" in found["verb assay"]["found"]
    assert found["default model"]["remedy"] == "bitassay models pull smollm2-135m"


def test_it_leaves_nothing_behind(bitassay, monkeypatch, tmp_path):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert bitassay("doctor").status == 0
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "broken",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("psutil", "huggingface_hub"))],
)
def test_it_answers_without_a_package_that_does_not_import(broken):
    words = ["doctor", "--format", "json"]
    script = f"import sys; sys.modules[{broken!r}] = None; from bitassay.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    rows = {row["subject"]: row for row in json.loads(done.stdout)["rows"]}
    assert done.returncode == (3 if broken == "torch" else 0)
    assert (rows["verb assay"]["status"] == "missing") == (broken == "torch")
    assert rows["verb report"]["status"] == "ok"


def test_an_extra_that_is_missing_stops_only_the_verb_that_needs_it(bitassay, monkeypatch):
    version = metadata.version

    def without_sacrebleu(name):
        if name == "sacrebleu":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_sacrebleu)
    done = bitassay("doctor", "--format", "json")
    found = findings(done)
    assert done.status == 0
    assert found["verb generate"]["found"] == "cannot run: sacrebleu"
    assert found["verb generate"]["remedy"] == "pip install 'bitassay[generation]'"
    assert found["verb eval"]["found"] == "can run"

"""What is recorded beside a result, and what doctor concludes."""

import json
import platform
import shutil
from collections import namedtuple

import pytest
import torch
from packaging.requirements import Requirement

from bitassay.bench import doctor
from bitassay.bench.doctor import Finding, machine, package, verb_finding, writable
from bitassay.record.environment import cpu_name, environment


def test_environment_is_plain_json():
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert len(found["load"]) == 3
    assert found["threads"] == torch.get_num_threads()


def test_the_processor_has_a_name():
    assert cpu_name().strip()


@pytest.mark.parametrize(
    ("specifier", "status"), [(">=2", "ok"), ("<1", "missing"), ("", "ok"), (">=1000", "missing")]
)
def test_a_version_against_what_is_needed(specifier, status):
    assert package(Requirement(f"numpy{specifier}")).status == status


def test_a_prerelease_counts(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "2.14.0.dev20260101+cpu")
    assert package(Requirement("torch>=2.13")).status == "ok"


def test_space_that_is_short(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert writable("cache", tmp_path / "new" / "deep", free // 2, "r") == Finding(
        "cache",
        f"{tmp_path / 'new' / 'deep'}: {free / 1e9:.1f} GB free",
        f"writable, {free // 2 / 1e9:.2g} GB free",
    )
    short = writable("cache", tmp_path, free * 2, "elsewhere")
    assert (short.status, short.remedy) == ("missing", "elsewhere")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert writable("cache", tmp_path / "file", 0, "r").status == "missing"


@pytest.mark.parametrize(
    ("available", "status"), [(doctor.MEMORY_BYTES - 1, "warning"), (doctor.MEMORY_BYTES, "ok")]
)
def test_memory_that_is_short(monkeypatch, available, status):
    now = namedtuple("Memory", "available total")(available, 10 * available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: now)
    assert machine()[-1].status == status


def test_verbs_need_only_what_they_use():
    findings = [Finding("scipy", "", status="missing"), Finding("matplotlib", "", status="warning")]
    found = {verb: verb_finding(verb, findings).found for verb in ("assay", "report")}
    assert found == {"assay": "cannot run: scipy", "report": "can run"}
    assert verb_finding("report", [Finding("jinja2", "", status="missing")]).found == "cannot run: jinja2"


def test_torch_that_does_not_import_stops_what_needs_it():
    findings = [Finding("torch import", "", status="missing")]
    statuses = [verb_finding(verb, findings).status for verb in ("eval", "recipes", "report")]
    assert statuses == ["missing", "missing", "ok"]

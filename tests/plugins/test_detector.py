"""A detector of another package is a column of `bitassay attack`, and decides where a profile says so."""

import json

import pytest

from bitassay.cli import run
from bitassay.verification.detectors.registry import DECIDING, DETECTORS
from bitassay.verification.profile import read_profile

MODEL = "stories260k"


@pytest.fixture(autouse=True)
def forgotten():
    """What a plug-in has registered is not there for other tests."""
    yield
    DETECTORS._items.pop("norm-ratio", None)


def objects(capsys, arguments, status=0):
    capsys.readouterr()
    assert run([*map(str, arguments), "--format", "json"]) == status
    return json.loads(capsys.readouterr().out)


def test_it_is_a_column_of_the_attack_study(example_plugin, tmp_path, capsys):
    few = ["--attacks", "int2", "--numerics", "same", "--sequences", 30, "--tokens", 4, "--alpha", 0.1]
    rows = objects(capsys, ["attack", MODEL, *few, "--out", tmp_path / "run"])["rows"]
    (row,) = [row for row in rows if row["detector"] == "norm-ratio"]
    assert row["tpr_at_1pct_fpr"] > 0.5
    assert row["bytes_per_token"] == 2


def test_it_takes_part_in_the_verdict(example_plugin, many_prompts, tmp_path, capsys):
    prompts, profile, trace = (tmp_path / name for name in ("prompts.txt", "profile.json", "cheap.trace"))
    prompts.write_text("\n".join(many_prompts))
    common = ["calibrate", MODEL, "--prompts", prompts, "--alpha", "0.05", "--max-new-tokens", 12]
    common += ["--guarantee", "average"]
    objects(capsys, [*common, "--out", profile, "--detectors", "norm-ratio"])
    assert set(read_profile(profile).fits) == {*DECIDING, "norm-ratio"}
    claim = ["--recipe", "w2", "--claim", MODEL, "--max-new-tokens", 12, "--out", trace]
    assert run(list(map(str, ["prove", MODEL, "--prompt", "the big cat", *claim]))) == 0
    row = objects(capsys, ["verify", trace, "--model", MODEL, "--profile", profile], 1)["rows"][0]
    assert row["score"]["detectors"]["norm-ratio"] > 3
    assert "detector-unlikely" in [reason["code"] for reason in row["reasons"]]
    assert "norm-ratio is" in "".join(reason["sentence"] for reason in row["reasons"])

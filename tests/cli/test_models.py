"""`bitassay models`."""

import csv
import io
import json

import pytest

from bitassay.models.catalogue import CATALOGUE


def test_list_has_every_model(bitassay):
    done = bitassay("models", "list")
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()[2:]] == list(CATALOGUE)


def test_list_as_json_and_csv_say_the_same(bitassay):
    rows = json.loads(bitassay("models", "list", "--format", "json").out)["rows"]
    table = list(csv.DictReader(io.StringIO(bitassay("models", "list", "--format", "csv").out)))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table
    stories = next(row for row in rows if row["name"] == "stories260k")
    assert stories["cached"] is True
    assert (stories["licence"], stories["source"]) == ("MIT", "bundled with bitassay")


def test_list_says_what_is_not_cached(bitassay, tmp_path, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path))
    rows = json.loads(bitassay("models", "list", "--format", "json").out)["rows"]
    assert next(row for row in rows if row["name"] == "smollm2-135m")["cached"] is False


def test_list_as_markdown(bitassay):
    lines = bitassay("models", "list", "--format", "md").out.splitlines()
    assert lines[0].startswith("| name | parameters |")
    assert len(lines) == 2 + len(CATALOGUE)


def test_check_prints_one_object(bitassay):
    done = bitassay("models", "check", "stories260k", "--format", "json")
    found = json.loads(done.out)
    assert done.status == 0
    assert (found["origin"], found["layers"], found["linears"], found["parameters"]) == (
        "bundled with bitassay",
        5,
        35,
        260_032,
    )
    assert "running stories260k once" in done.err


def test_check_as_a_table(bitassay):
    lines = bitassay("models", "check", "stories260k").out.splitlines()
    assert ["vocabulary", "512"] in [line.split() for line in lines]


def test_check_of_a_damaged_model(bitassay, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    done = bitassay("models", "check", str(tmp_path))
    assert (done.status, done.out) == (2, "")
    assert f"error: {tmp_path}/model.safetensors: truncated" in done.err


def test_pull_of_what_is_here(bitassay):
    done = bitassay("models", "pull", "stories260k", "--format", "json")
    row = json.loads(done.out)["rows"][0]
    assert (done.status, row["name"]) == (0, "stories260k")
    assert row["size_bytes"] > 1_000_000


@pytest.mark.real
def test_pull_and_check_the_default_model(bitassay):
    assert bitassay("models", "pull", "smollm2-135m").status == 0
    found = json.loads(bitassay("models", "check", "smollm2-135m", "--format", "json").out)
    assert (found["layers"], found["hidden_size"], found["linears"], found["parameters"]) == (
        30,
        576,
        210,
        134_515_008,
    )
    assert found["weights_sha256"] == "b73ce363117e93b2854ee619d72581bda616b770a59380e2c65af00bd7a01280"

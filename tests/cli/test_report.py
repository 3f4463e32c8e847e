"""`bitassay report`."""

import json

import pytest

from report.kinds import TASKS as RUN


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def test_a_run_folder_becomes_a_page(bitassay, run_folder, tmp_path):
    out = tmp_path / "new" / "report.html"
    done = bitassay("report", str(run_folder), str(run_folder / "run.json"), "--out", str(out))
    assert (done.status, done.out, done.err) == (0, f"{out}\n", "")
    assert out.read_text().count("<h1>Tasks: base, w4</h1>") == 2


def refuse(bitassay, tmp_path, *runs):
    """What is said on stderr where no report is written."""
    out = tmp_path / "report.html"
    done = bitassay("report", *map(str, runs), "--out", str(out))
    assert (done.status, done.out) == (2, "")
    assert not out.exists()
    assert "Traceback" not in done.err
    return done.err


def test_no_run(bitassay, tmp_path):
    assert "no run folder was given" in refuse(bitassay, tmp_path)


def test_a_folder_that_is_not_there(bitassay, tmp_path):
    assert "no such file" in refuse(bitassay, tmp_path, tmp_path / "gone")


def test_a_folder_without_a_run(bitassay, tmp_path, run_folder):
    (tmp_path / "empty").mkdir()
    assert "holds no run.json" in refuse(bitassay, tmp_path, tmp_path / "empty")
    assert "one of its folders: run" in refuse(bitassay, tmp_path, tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    assert "not finished" in refuse(bitassay, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "not a JSON file"),
        (b'{"schema_version": 2, "kind": "essay"}', "of kind 'essay'; known are assay"),
        (b'{"schema": 7, "kind": "bench"}', "in schema 7; this version of bitassay reads schemas 1 and 2"),
        (
            b'{"schema_version": 2, "kind": "assay"}',
            "run_id is missing; created is missing; model is missing",
        ),
        (json.dumps(RUN).replace("0.45", "NaN").encode(), "rows.1.value is nan, not a finite number"),
        (json.dumps(RUN).replace("0.45", '"many"').encode(), "value is 'many', which its column cannot show"),
    ],
)
def test_a_damaged_run(bitassay, tmp_path, run_folder, content, said):
    (run_folder / "run.json").write_bytes(content)
    error = refuse(bitassay, tmp_path, run_folder)
    assert said in error
    assert str(run_folder) in error


def test_an_oversize_run_is_not_read(bitassay, tmp_path, run_folder):
    with open(run_folder / "run.json", "r+b") as stream:
        stream.truncate(65 * 2**20)
    assert "more than the 67108864" in refuse(bitassay, tmp_path, run_folder)


def test_a_folder_where_the_page_should_be(bitassay, tmp_path, run_folder):
    done = bitassay("report", str(run_folder), "--out", str(tmp_path))
    assert done.status == 2
    assert str(tmp_path) in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

"""`bitassay study run task3.1`: what it prints and writes, and what it refuses. Cells are done in this process."""

import json

import pytest

pytest.importorskip("lm_eval")

from bitassay.studies.eight_bit.study import STUDIES, Study, weight_only
from bitassay.studies.variants import Variant

SMALL = Study(
    "task3.1",
    "a few variants",
    (Variant("bf16"), *(weight_only(f, g, "fake") for f in ("int8", "fp8") for g in ("tensor", "g64"))),
)
WORDS = ("--model", "stories260k", "--limit", "1", "--windows", "4", "--window", "48")


@pytest.fixture
def study(bitassay, workers_here, monkeypatch, tmp_path):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)
    monkeypatch.setitem(STUDIES, "task3.1", SMALL)
    return lambda *words: bitassay("study", "run", *words, "--out", str(tmp_path / "r"))


def test_a_run_a_page_and_a_report_of_it(study, bitassay, tmp_path):
    done = study("task3.1", *WORDS)
    assert done.status == 0
    names = [variant.name for variant in SMALL.variants]
    assert [
        line.split()[0] for line in done.out.splitlines() if line.startswith(("bf16", "int8", "fp8"))
    ] == names
    assert "not decidable at this n" in done.out
    page = (tmp_path / "r/report.html").read_text()
    assert "<svg" in page
    assert not any(word in page for word in ("src=", "url(http", "<script", 'href="http'))
    again = bitassay("report", str(tmp_path / "r"), "--out", str(tmp_path / "again.html"))
    assert (again.status, (tmp_path / "again.html").read_text()) == (0, page)
    rows = json.loads(study("task3.1", *WORDS, "--format", "json").out)["rows"]
    assert rows[1]["kl_mean"] > 0
    run = json.loads((tmp_path / "r/run.json").read_text())
    run["claims"][0]["unit"] = "miles"
    (tmp_path / "r/run.json").write_text(json.dumps(run))
    refused = bitassay("report", str(tmp_path / "r"), "--out", str(tmp_path / "third.html"))
    assert (refused.status, "which its column cannot show" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("task3.4", *WORDS), "no experiment is called 'task3.4'"),
        (("task3.1", "exp1", *WORDS), "one command for each kind"),
        (("task3.1", *WORDS, "--jobs", "0"), '"0" for --jobs'),
        (("task3.1", "--model", "stories260k", "--limit", "-1"), '"-1" for --limit'),
        (("task3.1", *WORDS, "--devices", "cpu", "cpu"), "one device"),
        (("task3.1", *WORDS, "--precision", "w4"), '"w4" for --precision'),
        (("exp1", "--model", "stories260k", "--ray", "auto"), "--ray auto"),
    ],
)
def test_what_it_refuses(study, words, said, tmp_path):
    done = study(*words)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "r").exists()

"""`bitassay study run control-table` and its like: what it prints and writes, and what it refuses. Cells and
timings are done in this process."""

import json

import pytest

from bitassay.bench import models
from bitassay.studies import run as study_run
from bitassay.studies.replication.study import STUDIES, Group, Study
from groups import W2, group

WORDS = ("--model", "stories260k", "--windows", "3", "--window", "48")
SMALL = Study(
    "control-table",
    "two groups",
    (Group("Baseline"), group("Simple-2bit", W2, {}, activations={"format": "int8"})),
    speed=True,
)
ASKED = {"group", "bits_per_weight", "ppl", "ppl_delta", "ppl_delta_ci", "kl_mean", "kl_ci", "decode_tok_s"}
ASKED |= {"peak_bytes", "grade", "flop_per_token", "size_bytes", "passes"}


@pytest.fixture
def study(bitassay, workers_here, monkeypatch, tmp_path):
    quick = {"repeats": 2, "prompt_tokens": 8, "new_tokens": 2}
    monkeypatch.setattr(study_run, "bench", lambda *a, **k: models.bench(*a, **{**k, **quick}))
    monkeypatch.setitem(STUDIES, "control-table", SMALL)
    return lambda *words: bitassay("study", "run", *words, "--out", str(tmp_path / "r"))


def test_a_table_a_page_and_a_report_of_it(study, bitassay, tmp_path):
    done = study("control-table", *WORDS, "--format", "json")
    assert done.status == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["group"] for row in rows] == ["Baseline", *["Simple-2bit"] * 3]
    assert all(row.keys() >= ASKED and row["decode_tok_s"] > 0 < row["peak_bytes"] for row in rows)
    beats = {f"beats_{kind}": None for kind in ("single", "rescaled", "equal_bits", "equal_flops")}
    for pair in json.loads(done.out)["runs"][0]["pairs"]:
        assert pair["decode_tok_s"] > 0 < pair["control_decode_tok_s"]
        low, high = pair["kl_ci"]
        for kind in pair["role"].split(", "):
            beats[f"beats_{kind.replace('-', '_')}"] = None if low <= 0 <= high else high < 0
    assert rows[1].items() >= beats.items()
    assert set(beats.values()) != {None}
    assert rows[1]["flop_per_token"] > 1.8 * rows[2]["flop_per_token"]
    page = (tmp_path / "r/report.html").read_text()
    assert "<svg" in page
    assert not any(word in page for word in ("src=", "url(http", "<script", 'href="http'))
    again = bitassay("report", str(tmp_path / "r"), "--out", str(tmp_path / "again.html"))
    assert (again.status, (tmp_path / "again.html").read_text()) == (0, page)
    table = study("control-table", *WORDS)  # from the run folder
    shown = [line.split()[0] for line in table.out.splitlines() if line.startswith(("Baseline", "Simple"))]
    assert shown == [row["group"] for row in rows]
    assert "bring a 2-bit model nearer" in table.out
    run = json.loads((tmp_path / "r/run.json").read_text())
    run["pairs"][0]["beats"] = "surely"
    (tmp_path / "r/run.json").write_text(json.dumps(run))
    refused = bitassay("report", str(tmp_path / "r"), "--out", str(tmp_path / "third.html"))
    assert (refused.status, "beats is 'surely'" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("control-table",), "no model was given"),
        (("control-table", *WORDS, "--only", "Simple-3bit"), "no group 'Simple-3bit'"),
        (("control-table", *WORDS, "--limit", "3"), "asks no questions"),
        (("task3.1", *WORDS, "--only", "w2"), "no variant is called that"),
        (("exp1", *WORDS, "--only", "w2"), "the other studies have no parts"),
        (("phase1", "exp1", *WORDS), "one command for each kind"),
        (("phase5", *WORDS), "phase5"),
        (("control-table", *WORDS, "--precision", "int8"), '"int8" for --precision'),
    ],
)
def test_what_it_refuses(study, words, said, tmp_path):
    done = study(*words)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "r").exists()


def test_studies_are_listed(bitassay):
    listed = [row["study"] for row in json.loads(bitassay("study", "list", "--format", "json").out)["rows"]]
    assert listed[-len(STUDIES) :] == list(STUDIES)

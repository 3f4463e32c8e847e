"""`bitassay study`: what it prints and writes, and what it refuses. Workers run inside this process."""

import json

import pytest

from bitassay.record.files import write_text
from bitassay.studies.verillm.thresholds import read_thresholds

SMALL = ("--tokens", "4", "--prompt-tokens", "8", "--trials", "1", "--verifiers", "1", "--precision", "bf16")


@pytest.fixture
def study(bitassay, workers_here, tmp_path):
    def call(*words):
        return bitassay("study", "run", *words, "--model", "stories260k", "--out", str(tmp_path / "data"))

    return call


def test_the_list_names_all_studies(bitassay):
    rows = json.loads(bitassay("study", "list", "--format", "json").out)["rows"]
    names = ["exp1", "exp2", "exp3", "exp4", "exp5", "separability", "task3.1", "task3.2", "task3.3"]
    names += ["control-table", "phase1", "phase2", "phase3", "phase4", "uses", "planes"]
    assert [row["study"] for row in rows] == names
    assert rows[3]["expected"] == [0.7, 0.8]


def test_a_run_prints_measured_beside_expected_and_writes_a_page(study, tmp_path):
    done = study("exp1", "exp3", *SMALL)
    assert done.status == 0
    head, *lines = [line for line in done.out.splitlines() if line.startswith(("study", "exp"))]
    assert "measured" in head
    assert [line.split()[0] for line in lines] == ["exp1", "exp3"]
    page = (tmp_path / "data" / "report.html").read_text()
    assert "<svg" in page
    assert not any(word in page for word in ("src=", "url(http", "<script", 'href="http'))


def test_json_is_one_object_with_rows(study):
    done = study("exp1", *SMALL, "--format", "json")
    [row] = json.loads(done.out)["rows"]
    assert (row["study"], row["kind"], row["expected"]) == ("exp1", "experiments", [0.95, 1.0])
    assert {"avg_accept_rate", "avg_overhead_percentage", "pass_rate"} <= set(row)


def test_separability_is_a_matrix(study):
    words = ("--tokens", "4", "--prompt-tokens", "8", "--trials", "4", "--precision", "bf16")
    done = study("separability", *words, "--precisions", "bf16", "w2", "--alpha", "0.25")
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()[2:]] == ["bf16", "w2"]
    assert done.out.count("honest") == 2


def test_one_half_alone_says_what_is_waited_for(study):
    done = study("exp1", *SMALL, "--role", "prove")
    assert done.status == 0
    assert "exp1: waits for bf16 on cpu verifying bf16 on cpu" in done.err


def test_rules_from_a_file(study, tmp_path):
    path = tmp_path / "mine.yaml"
    write_text(
        path,
        "experiment: {thresholds: {Pe: 9, Pm: -1, Pw: -1, mean_epsilon: 9}, accept_rate_min: 0.5}\n",
    )
    assert read_thresholds(path)[1] == 0.5
    [row] = json.loads(study("exp3", *SMALL, "--rules", str(path), "--format", "json").out)["rows"]
    assert (row["rules"], row["bar"], row["avg_accept_rate"]) == ("mine", 0.5, 1.0)
    assert row["refused"]["w4"] == "0/1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("exp9",), "no experiment is called 'exp9'"),
        (("exp1", "--devices", "tpu"), "'tpu' is no machine"),
        (("exp1", "--devices", "cpu", "cpu+avx2", "mps"), "--devices names 3 machines"),
        (("exp1", "--rules", "papers"), "no rules are called 'papers'"),
        (("exp1", "--rules", "nothing.yaml"), "nothing.yaml: No such file"),
        (("exp1", "--quantized", "w99"), "neither a recipe nor a checkpoint"),
        (("exp1", "--trials", "-1"), '"-1" for --trials'),
    ],
)
def test_what_it_refuses(study, words, said):
    done = study(*words)
    assert done.status == 2
    assert said in done.err
    assert done.out == ""


def test_a_run_needs_a_model(bitassay):
    done = bitassay("study", "run", "separability")
    assert (done.status, "--model" in done.err) == (2, True)


def test_thresholds_of_an_experiment(bitassay, workers_here, tmp_path):
    """Fitted, written as a file that a later run takes, and scored."""
    out = tmp_path / "data"
    words = ("--max-new-tokens", "4", "--prompt-tokens", "8", "--precision", "bf16", "--attacks", "w2")
    done = bitassay(
        *("calibrate", "stories260k", "--study", "exp1", "--trials", "7", "--alpha", "0.25", *words),
        *("--out", str(out), "--format", "json"),
    )
    assert done.status == 0
    [row] = json.loads(done.out)["rows"]
    assert row["attacks"]["w2"]["n"] == 7
    assert read_thresholds(out / "threshold_optimization" / "exp1_stories260k_cpu_to_cpu_thresholds.yaml")
    page = (out / "threshold_optimization" / "report.html").read_text()
    assert page.count("<svg") == 1
    done = bitassay("calibrate", "stories260k", "--study", "exp1", "--trials", "20", *words)
    assert (done.status, "--trials 30" in done.err) == (2, True)

"""`bitassay eval --tasks`."""

import json

import pytest

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)


def test_tasks_of_a_model_and_its_recipes(bitassay, tmp_path):
    words = ["eval", "stories260k", "--recipe", "w4", "--tasks", "hellaswag, arc_challenge", "--limit", "3"]
    words += ["--out", str(tmp_path / "run")]
    done = bitassay(*words, "--format", "json")
    assert done.status == 0
    run = json.loads(done.out)
    assert [(row["task"], row["metric"], row["model"]) for row in run["rows"]] == [
        (task, metric, model)
        for task in ("hellaswag", "arc_challenge")
        for metric in ("acc", "acc_norm")
        for model in ("base", "w4")
    ]
    assert run == json.loads((tmp_path / "run/run.json").read_text())
    assert run["environment"]["torch"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/parts").iterdir()}

    again = bitassay(*words)
    assert again.status == 0
    assert "hellaswag/0-shot[n=3 of the bundled slice]" in again.out
    assert "McNemar" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/parts").iterdir()}


def test_one_model_against_another(bitassay, tmp_path):
    done = bitassay(
        *("eval", "stories260k", "--against", "stories260k", "--tasks", "arc_challenge", "--limit", "2"),
        *("--out", str(tmp_path / "run")),
    )
    assert (done.status, done.out) == (2, "")
    assert "named twice" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "hellaswag", "--limit", "0"], '"0" for --limit'),
        (["--tasks", ","], "no task was given"),
        (["--limit", "3"], "belong to tasks"),
        (["--include-path", "."], "belong to tasks"),
        (["--tasks", "mine", "--include-path", "nowhere"], "nowhere: no task YAML in it"),
        (["--tasks", "hellaswag", "--protocol", "c4-new"], "belong to perplexity"),
        (["--tasks", "hellaswag", "--windows", "0"], "belong to perplexity"),
        (["--tasks", "hellaswag", "--recipe", "w4", "--against", "stories260k"], "both name a comparison"),
    ],
)
def test_bad_usage(bitassay, words, said):
    done = bitassay("eval", "stories260k", *words)
    assert (done.status, done.out) == (2, "")
    assert said in done.err

"""--engine: who runs a model, on the verbs that ask it, and what is refused before work."""

import json

import pytest

from bitassay.engines import ENGINES
from engines.hosted import Other, Reader


@pytest.fixture(autouse=True)
def _other_engine(monkeypatch, short_texts, tmp_path):
    monkeypatch.setitem(ENGINES._items, "other", Other)
    monkeypatch.setitem(ENGINES._items, "reader", Reader)
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))


OTHER = ("--engine", "other")


def test_eval_compares_two_engines_on_one_model(bitassay):
    words = ("--window", "64", "--windows", "2", "--format", "json")
    done = bitassay("eval", "stories260k", *OTHER, "--against", "stories260k", *words)
    assert done.status == 0, done.err
    run = json.loads(done.out)
    (row,) = run["rows"]
    assert (row["recipe"], row["against"]) == ("stories260k in other", "stories260k")
    assert row["kl_mean"] < 1e-6
    assert run["settings"]["engine"]["engine"] == "other"
    alone = json.loads(bitassay("eval", "stories260k", *OTHER, *words).out)["rows"][0]
    assert alone["ppl"] == pytest.approx(row["ppl"])


def test_tasks_compare_two_engines_on_one_model(bitassay, tmp_path):
    pytest.importorskip("lm_eval")
    words = ("--tasks", "hellaswag", "--limit", "2", "--engine", "reader", "--against", "stories260k")
    done = bitassay("eval", "stories260k", *words, "--out", str(tmp_path / "t"), "--format", "json")
    assert done.status == 0, done.err
    run = json.loads(done.out)
    assert list(run["models"]) == ["stories260k", "stories260k in reader"]
    assert run["models"]["stories260k in reader"]["engine"] == "reader"
    assert [row["difference"] for row in run["rows"] if row["against"]] == [0, 0]


def test_bench_times_engines_beside_each_other(bitassay, workers_here, tmp_path):
    words = ["bench", "stories260k", "--candidate", "reader:stories260k", "--batches", "1", "2", "--contexts"]
    words += ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "3", "--out", str(tmp_path / "b")]
    done = bitassay(*words, "--format", "json")
    assert done.status == 0, done.err
    run = json.loads(done.out)
    base, hosted, _, refused = run["rows"]
    assert refused["skipped"] == "the reader reads one text at a time"
    assert (hosted["model"], hosted["decode_tok_s"]) == ("reader:stories260k", 1.0)
    assert hosted["decode_ratio"] == pytest.approx(1 / base["decode_tok_s"], rel=0.5)
    assert hosted["prefill_share_of_bound"] is None
    assert hosted["decode_bytes"] > base["decode_bytes"]  # float32 in the file
    assert run["models"][1]["engine"] == "reader"
    alone = ["bench", "stories260k", "--engine", "reader", *words[4:-2], "--out", str(tmp_path / "c")]
    run = json.loads(bitassay(*alone, "--format", "json").out)
    assert [(row["model"], row["batch"], "skipped" in row) for row in run["rows"]] == [
        ("base", 1, False), ("base", 2, True),
    ]  # fmt: skip
    wrong = bitassay("bench", "stories260k", "--candidate", "lama.cpp:stories260k")
    assert (wrong.status, "did you mean" in wrong.err or "'llama.cpp'" in wrong.err) == (2, True), wrong.err


def test_generate_compares_the_texts_of_two_engines(bitassay, tmp_path):
    words = ("--prompts", "2", "--new-tokens", "6", "--out", str(tmp_path / "run"), "--format", "json")
    done = bitassay("generate", "stories260k", "--candidate", "stories260k", *OTHER, *words)
    assert done.status == 0, done.err
    run = json.loads(done.out)
    assert run["rows"][0]["identical_fraction"] == 1
    assert run["settings"]["engine"] == "other"


def test_prove_calibrate_and_verify(bitassay, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Once upon a time {word}" for word in range(40)))
    trace, profile = str(tmp_path / "x.trace"), str(tmp_path / "profile.json")
    length, dtype = ("--max-new-tokens", "10"), ("--dtype", "float32")
    assert (
        bitassay("prove", "stories260k", *OTHER, "--prompt", "A dog", "--out", trace, *length, *dtype).status
        == 0
    )
    words = ("--prompts", str(prompts), "--alpha", "0.2", "--guarantee", "average", "--out", profile)
    done = bitassay("calibrate", "stories260k", *OTHER, *length, *dtype, *words)
    assert done.status == 0, done.err
    done = bitassay("verify", trace, "--model", "stories260k", *dtype, "--profile", profile)
    assert "no calibration profile" not in done.out
    assert json.loads((tmp_path / "profile.json").read_text())["prover"]["engine"] == "other"
    bitassay("prove", "stories260k", "--prompt", "A dog", "--out", trace + "2", *length, *dtype)
    done = bitassay("verify", trace + "2", "--model", "stories260k", *dtype, "--profile", profile)
    assert "INCONCLUSIVE" in done.out  # another engine than that of the profile


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("eval M --recipe w4", "other reads files"),
        ("bench M --recipe w4", "other reads files"),
        ("bench M", "the engine other says no times"),
        ("eval M --attention eager", "--attention eager is of transformers"),
        ("eval M --device cuda", "device cuda"),
        ("generate M --recipe w4", "other reads files"),
        ("prove M --recipe w4 --prompt A --out x.trace", "other reads files"),
        ("calibrate M --suspects int8", "--suspects are of transformers"),
        ("calibrate M --prover-dtype float16", "are of transformers, and other proves"),
    ],
)
def test_what_is_of_transformers_is_refused_before_work(bitassay, monkeypatch, tmp_path, words, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bitassay.engines.load.resolve", lambda *_, **__: pytest.fail("work was done"))
    done = bitassay(*words.replace("M", "stories260k").split(), *OTHER)
    assert done.status == 2
    assert problem in done.err


def test_an_unknown_engine_is_named(bitassay):
    done = bitassay("eval", "stories260k", "--engine", "sglang")
    assert done.status == 2
    assert "engines: no 'sglang'" in done.err

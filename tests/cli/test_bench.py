"""`bitassay bench`, `bench matmul`, `generate`, and `eval --protocol`."""

import json
import math

import pytest


@pytest.fixture(autouse=True)
def _short_texts(short_texts, monkeypatch):
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))


def test_bench(bitassay, workers_here, tmp_path):
    words = ["bench", "stories260k", "--recipe", "w8", "--batches", "1", "--contexts", "600"]
    words += ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "2", "--out", str(tmp_path / "b")]
    done = bitassay(*words, "--format", "json")
    assert done.status == 0, done.err
    run = json.loads(done.out)
    assert [(row["model"], row.get("skipped")) for row in run["rows"]] == [
        ("base", None), ("w8", None), ("base", "the model has 512 positions"), ("w8", "the model has 512 positions"),
    ]  # fmt: skip
    assert (tmp_path / "b" / "report.html").is_file()
    assert "Measured on the spot" in done.err
    del workers_here[:]
    table = bitassay(*words)  # from the run folder
    assert (table.status, workers_here) == (0, []), table.err
    assert "the model has 512 positions" in table.out


@pytest.mark.slow
def test_a_replica_is_timed_beside_its_controls(bitassay, workers_here, tmp_path):
    (tmp_path / "twice.yaml").write_text(
        "name: twice\nweights: {format: int2, granularity: g32}\n"
        "replication: {how: parallel, of: linear, differ: residual}\n"
    )
    words = ["bench", "stories260k", "--recipe", str(tmp_path / "twice.yaml"), "--batches", "1", "--contexts"]
    words += ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "3"]
    done = bitassay(*words, "--out", str(tmp_path / "b"), "--format", "json")
    assert done.status == 0, done.err
    run = json.loads(done.out)
    names = ["base", "twice", "twice-single", "twice-equal-bits"]
    assert [row["model"] for row in run["rows"]] == names
    assert [(pair["role"], pair["control"]) for pair in run["pairs"]] == [
        ("single", "twice-single"), ("equal-bits, equal-flops", "twice-equal-bits"),
    ]  # fmt: skip
    seconds = {
        name: [one["cells"]["batch-1x8+2"]["answers"][name]["decode_s"] for one in run["rounds"]]
        for name in names
    }
    for pair in run["pairs"]:
        ratios = [a / b for a, b in zip(seconds[pair["control"]], seconds["twice"], strict=True)]
        assert pair["decode_ratio"] == pytest.approx(math.prod(ratios) ** (1 / 3))
        assert pair["decode_ratio_ci"][0] < pair["decode_ratio"] < pair["decode_ratio_ci"][1]
    table = bitassay(*words, "--out", str(tmp_path / "b"))
    assert "over its control" in table.out
    assert "Speed of replicas over their controls" in (tmp_path / "b" / "report.html").read_text()
    alone = bitassay(*words, "--no-controls", "--out", str(tmp_path / "alone"), "--format", "json")
    assert [row["model"] for row in json.loads(alone.out)["rows"]] == names[:2]
    assert json.loads(alone.out)["pairs"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "stories260k", "--batches", "0"], '"[0]" for --batches'),
        (["bench", "stories260k", "--recipe", "w5"], "no recipe is called 'w5'"),
        (["bench", "stories260k", "--dtype", "int8"], '"int8" for --dtype'),
        (["bench", "matmul", "--shapes", "16"], "'16' is not a shape"),
        (["bench", "matmul", "--shapes", "0x4"], "a product of 0x4"),
        (["generate", "stories260k"], "nothing to compare"),
        (["eval", "stories260k", "--protocol", "ptb"], "no protocol is called 'ptb'"),
        (
            ["eval", "stories260k", "--protocol", "c4-train-new/64[n=2]", "--windows", "3"],
            "says 2, --windows says 3",
        ),
    ],
)
def test_mistakes(bitassay, words, said):
    done = bitassay(*words)
    assert done.status == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_text_that_is_not_here(bitassay):
    done = bitassay("eval", "stories260k", "--protocol", "c4-new")
    assert done.status == 3
    assert "or take c4-train-new" in done.err


def test_matmul(bitassay, tmp_path):
    words = ["bench", "matmul", "--shapes", "4x32", "--draws", "1", "--repeats", "0"]
    done = bitassay(*words, "--format", "json", "--out", str(tmp_path / "m.html"))
    assert done.status == 0, done.err
    assert {(row["format"], row["scales"]) for row in json.loads(done.out)["rows"]} == {
        ("bfloat16", "-"), ("int8", "row"), ("int8", "tensor"), ("fp8", "row"), ("fp8", "tensor"),
    }  # fmt: skip
    assert (tmp_path / "m.html").is_file()
    assert "product" in bitassay(*words).out


def test_generate(bitassay, tmp_path):
    words = ["generate", "stories260k", "--recipe", "w8", "--prompts", "2", "--new-tokens", "3"]
    words += ["--out", str(tmp_path / "g")]
    done = bitassay(*words, "--format", "json")
    assert done.status == 0, done.err
    assert set(json.loads(done.out)["texts"]) == {"base", "w8"}
    assert {"report.html", "ratings.csv", "run.json"} <= {path.name for path in (tmp_path / "g").iterdir()}
    table = bitassay(*words)
    *_, row, empty, note = table.out.splitlines()
    assert row.startswith("w8")
    assert "base" not in row
    assert (empty, note.partition(":")[0]) == ("", "[—] no interval")  # of two prompts


def test_protocols(bitassay):
    words = ["eval", "stories260k", "--protocol", "wikitext2-raw", "c4-train-new/32[n=2]", "--windows", "2"]
    done = bitassay(*words, "--window", "32", "--format", "json")
    assert done.status == 0, done.err
    whole = json.loads(done.out)
    assert [row["protocol"] for row in whole["rows"]] == ["wikitext2-raw/32[n=2]", "c4-train-new/32[n=2]"]
    assert all(row["source"] and row["ppl_ci"] is None for row in whole["rows"])  # of two windows
    assert whole["environment"]["bitassay"]


def test_recipes_are_evaluated_in_the_order_given(bitassay):
    words = ("eval", "stories260k", "--recipe", "w4", "--recipe", "w8", "--windows", "2", "--window", "32")
    done = bitassay(*words, "--format", "json")
    assert [row["recipe"] for row in json.loads(done.out)["rows"]] == ["w4", "w8"]
    assert [row["kl_mean"] > 0 for row in json.loads(done.out)["rows"]] == [True, True]


def test_text_that_a_recipe_was_calibrated_on_is_named(bitassay, tmp_path, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nweights: {format: int4}\ngptq: {}\ncalibration: {samples: 2, tokens: 32}\n"
    )
    words = ["eval", "stories260k", "--recipe", str(recipe), "--windows", "2", "--window", "32"]
    assert (
        "mine was calibrated on the text of c4-train-new/32[n=2]"
        in bitassay(*words, "--protocol", "c4-train-new").err
    )
    assert "was calibrated" not in bitassay(*words, "--protocol", "wikitext2-raw").err

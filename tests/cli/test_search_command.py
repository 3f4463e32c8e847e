"""`bitassay search`."""

import json

SPACE = """
name: mine
recipe: {weights: {format: int3}}
parameters:
  weights.granularity: [g32, g64]
  "weights.offset": {low: 0.0, high: 0.5}
"""


def test_search_writes_recipes_that_other_verbs_take(bitassay, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    out = tmp_path / "run"
    words = [
        "search",
        str(tmp_path / "space.yaml"),
        "--model",
        "stories260k",
        "--trials",
        "4",
        "--window",
        "96",
    ]
    words += ["--windows", "3", "--short", "1", "--against", "w3", "w4", "--out", str(out)]
    words += ["--objective", "kl_mean", "--objective", "bits_per_weight"]
    done = bitassay(*words)
    assert done.status == 0, done.err
    assert "KL less that of" in done.out
    assert "w4 " in done.out
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "weights.offset" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    found = json.loads(bitassay(*words, "--format", "json").out)
    assert found == json.loads((out / "run.json").read_text())
    (best, *_) = sorted((out / "best").glob("*.yaml"))
    shown = bitassay("eval", "stories260k", "--recipe", str(best), "--windows", "1", "--window", "96")
    assert (shown.status, best.stem in shown.out) == (0, True)


def test_bad_usage(bitassay, tmp_path):
    for words, said in (
        (["two-bits"], "no space is called 'two-bits'"),
        ([str(tmp_path / "absent.yaml")], "absent.yaml"),
        (["two-bit", "--at-most", "size"], "'size' is no limit"),
        (["two-bit", "--objective", "quality"], "no column is called 'quality'"),
    ):
        done = bitassay("search", *words, "--model", "stories260k", "--out", str(tmp_path / "run"))
        assert (done.status, done.out) == (2, "")
        assert said in done.err
    assert not (tmp_path / "run").exists()

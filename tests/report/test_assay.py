import copy
import json
import re
from html.parser import HTMLParser

import pytest

from bitassay.errors import BitassayError
from bitassay.report.assay import ASSAY_COLUMNS, headline, write_picture, write_report
from bitassay.report.schema import parse_run, read_run
from bitassay.report.tables import render

BASE = {
    "recipe": "base", "recipe_id": None, "bits_per_weight": 16.0, "size_bytes": 269_000_000, "ppl": 22.7, "ppl_ci": [20.1, 25.0],
    "ppl_delta": 0.0, "ppl_delta_ci": [0.0, 0.0], "kl_mean": 0.0, "kl_ci": [0.0, 0.0], "top1_agreement": 1.0, "top1_ci": [1.0, 1.0],
    "prefill_tok_s": 900.0, "decode_tok_s": 30.0, "hidden_distance": 0.016, "hidden_distance_by_layer": [0.008, 0.016],
    "hidden_distance_range_by_layer": [[0.007, 0.009], [0.014, 0.018]], "verdict": "PASS", "traces": 8, "traces_passed": 8, "p_value": 0.4,
}  # fmt: skip
W8 = BASE | {
    "recipe": "w8", "bits_per_weight": 8.02, "size_bytes": 163_000_000, "ppl": 22.8, "ppl_delta": 0.1, "ppl_delta_ci": [-0.1, 0.3],
    "kl_mean": 0.004, "kl_ci": [0.003, 0.005], "top1_agreement": 0.971, "verdict": "FAIL", "traces_passed": 1, "p_value": 1e-9,
    "hidden_distance_by_layer": [0.02, 0.05],
}  # fmt: skip
W2 = W8 | {
    "recipe": "w2",
    "ppl": 4.1e6,
    "ppl_delta": 4.0e6,
    "ppl_delta_ci": [3e6, 5e6],
    "kl_mean": 8.0,
    "kl_ci": [7.0, 9.0],
}
RUN = {
    "schema": 1,
    "kind": "assay",
    "run_id": "0123456789ab",
    "created": "2026-01-01T00:00:00+00:00",
    "model": {"name": "toy", "origin": "bundled", "parameters": 10},
    "protocol": {"id": "wikitext2-raw/512[n=4]", "windows": 4, "predicted_tokens": 2044, "interval": "95 %"},
    "recipes": {"w8": {"name": "w8"}, "w2": {"name": "w2"}},
    "verification": {"layers": [8, 16], "alpha": 0.01},
    "environment": {"python": "3.11"},
    "seconds": {"evaluate": 1.0},
    "rows": [BASE, W8, W2],
}


class Checker(HTMLParser):
    """Counts tags and collects attributes that would load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value
            for key, value in attrs
            if key in ("src", "href", "xlink:href") and value and not value.startswith("#")
        ]


def page(tmp_path, run) -> tuple[str, Checker]:
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    return text, checker


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    text, checker = page(tmp_path, RUN)
    assert checker.loads == []
    assert "script" not in checker.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert checker.tags.count("svg") == 3
    for value in ("4.10e+06", "97.1 %", "wikitext2-raw/512[n=4]", "1 of 8", "1e-09", "toy", "3.11"):
        assert value in text


def test_equal_runs_give_equal_pages(tmp_path):
    assert page(tmp_path, RUN)[0] == page(tmp_path, copy.deepcopy(RUN))[0]


@pytest.mark.parametrize(
    "path",
    [
        ("model", "name"),
        ("model", "origin"),
        ("environment", "python"),
        ("recipes", "w8", "name"),
        ("created",),
    ],
)
def test_text_from_a_run_cannot_become_markup(tmp_path, path):
    run = copy.deepcopy(RUN)
    place = run
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "<script>alert(1)</script><img src=x>"
    text, checker = page(tmp_path, run)
    assert "script" not in checker.tags
    assert "img" not in checker.tags
    assert "alert(1)" in text


def test_a_recipe_name_cannot_become_markup_in_a_plot(tmp_path):
    run = RUN | {"rows": [BASE, W8 | {"recipe": "<script>$x^</script>"}]}
    assert "script" not in page(tmp_path, run)[1].tags


def test_without_verdicts_and_timings_the_rest_is_shown(tmp_path):
    bare = {
        "hidden_distance": None,
        "hidden_distance_by_layer": None,
        "verdict": None,
        "prefill_tok_s": None,
        "decode_tok_s": None,
    }
    run = RUN | {"verification": None, "rows": [row | bare for row in (BASE, W8)]}
    text, checker = page(tmp_path, run)
    assert checker.tags.count("svg") == 1
    assert "Verdicts" not in text


def test_several_runs_in_one_page(tmp_path):
    text, _ = page(tmp_path, [RUN, RUN | {"model": {"name": "second", "origin": "x"}}])
    assert "toy" in text
    assert "second" in text


def test_the_headline_claims_only_what_intervals_show():
    text = headline(parse_run(RUN, "x"))
    assert "No difference in perplexity is visible for w8" in text
    assert "w2 differs" in text
    assert "rejects w8 and w2" in text


def test_the_table_of_an_assay():
    text = render(RUN["rows"], ASSAY_COLUMNS, "table")
    assert "0.10 [-0.10, 0.30]" in text
    assert "163.0 MB" in text
    assert max(map(len, text.splitlines())) <= 140
    base = next(line for line in text.splitlines() if line.startswith("base"))
    assert "[" not in base


def test_pictures(tmp_path):
    write_picture(RUN, tmp_path / "a.png")
    write_picture(RUN, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    "defect",
    [
        {"schema": 2}, {"kind": "study"}, {"rows": []}, {"rows": [BASE | {"ppl": "many"}]}, {"rows": [BASE | {"ppl": None}]},
        {"rows": [BASE | {"verdict": "MAYBE"}]}, {"rows": [BASE | {"recipe": "x" * 100}]}, {"model": "toy"},
    ],
)  # fmt: skip
def test_what_is_not_an_assay_is_refused(defect):
    with pytest.raises(BitassayError, match="not a run of"):
        parse_run(RUN | defect, "here")


def test_reading_a_folder(tmp_path):
    with pytest.raises(BitassayError, match="not finished"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN).replace("22.7", "NaN", 1))
    with pytest.raises(BitassayError, match="finite"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert read_run(tmp_path).rows[1].recipe == "w8"

"""What an assay says to people: table, headline, page."""

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitassay.report.columns import COLUMNS
from bitassay.report.figures.assay import quality_figure
from bitassay.report.figures.drawing import svg
from bitassay.report.findings import headline
from bitassay.report.page import write_page
from bitassay.report.pages import page_of, write_picture
from bitassay.report.tables import plain, printable, render
from report.example import BASE, NO_SPEED, NO_VERDICT, RUN, W1, W4, W8

ASSAY = COLUMNS["assay"]
GOLDEN = Path(__file__).parent / "assay_table.txt"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


class Reader(HTMLParser):
    """What a page is made of: tags, ids, what it would load, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.handlers, self.words = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value)
            if key.startswith("on"):
                self.handlers.append(value)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(folder, run) -> tuple[str, Reader]:
    runs = run if isinstance(run, list) else [run]
    write_page([page_of(one) for one in runs], folder / "report.html")
    source = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(source)
    return source, reader


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[str, Reader]:
    """The page of two runs."""
    return page(tmp_path_factory.mktemp("page"), [RUN, RUN | {"model": {"name": "second", "origin": "hub"}}])


def test_the_page_loads_nothing(shown):
    source, reader = shown
    assert all(link.startswith("#") for link in reader.links)
    assert not {"script", "link", "iframe", "img", "object"} & set(reader.tags)
    assert not re.search(r"url\((?!#)|@import|@font-face", source)
    addresses = set(re.findall(r"\w+://[^\"'<> ]*", source))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses


def test_every_number_of_a_row_is_on_the_page(shown):
    text = shown[1].text
    for column in ASSAY:
        for row in RUN["rows"]:
            value, _, interval = column.text(row).partition(" [")
            assert value in text
            assert interval in text
    for said in ("8 of 8", "5 of 8", "0.41", "0.012", "1.2e-09", "[-0.13, 0.34]", "[0.00333, 0.00519]"):
        assert said in text


def test_where_the_numbers_come_from_is_on_the_page(shown):
    text = shown[1].text
    for said in ("toy", "second", "0123456789ab", "wikitext2-raw/512[n=4]", "2044", "95 %, paired", "d" * 64):
        assert said in text
    for said in ("3.11.7", "0.25, 0.5, 0.75", "61.25", "0.0004, 0.0894", "8" * 64, '"format": "int8"'):
        assert said in text


def test_tables_have_headers_and_plots_a_description(shown):
    source, reader = shown
    assert reader.tags.count("svg") == 2 * 3
    assert source.count('role="img" aria-label="') == 2 * 3
    assert source.count('scope="row"') == 2 * (4 + 4 + 3)
    assert '<html lang="en">' in source


def test_ids_are_unique_and_links_lead_somewhere(shown):
    source, reader = shown
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(reader.ids)


def test_plots_follow_light_and_dark(shown):
    source, _ = shown
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    used = set(re.findall(r"var\((--series-\d)\)", drawings))
    assert {"--series-0", "--series-1", "--series-2", "--series-3"} <= used
    for name in used:
        assert source.count(f"{name}: #") == 2  # light and dark
    assert not re.search(r"fill: ?#fff", drawings)


def test_equal_runs_give_equal_plots():
    assert svg(quality_figure(RUN), "a-") == svg(quality_figure(copy.deepcopy(RUN)), "a-")


def test_text_from_a_run_cannot_become_markup(tmp_path):
    run = copy.deepcopy(RUN)
    run |= {"run_id": EVIL, "created": EVIL, "seconds": {EVIL: 1.0}, "recipes": {EVIL: {EVIL: [EVIL]}}}
    for part in ("model", "protocol", "verification", "environment"):
        kept = {key: value for key, value in run[part].items() if not isinstance(value, str)}
        run[part] = run[part] | dict.fromkeys(run[part].keys() - kept.keys(), EVIL) | {EVIL: EVIL}
    run["rows"][1]["recipe_id"] = EVIL
    for row in run["rows"][1:]:
        row["recipe"] = f"<img src=x {row['recipe']}>"
    _, reader = page(tmp_path, run)
    assert not {"script", "img"} & set(reader.tags)
    assert reader.handlers == []
    assert reader.text.count(EVIL) >= 10
    assert "<img src=x w8>" in reader.text


@pytest.mark.parametrize("name", ["$x^$", "_private", "100 %\tü\x00\u202e", "\\frac{", "]]>", "-->"])
def test_any_recipe_name_can_be_drawn(name):
    """Not taken for a formula, a hidden label or the end of anything."""
    run = RUN | {"rows": [BASE, W8 | NO_SPEED | {"recipe": name}]}
    drawn = Reader()
    drawn.feed(svg(quality_figure(run), "a-"))
    assert drawn.text.count(printable(name)) == 2
    assert headline(run).count(name) == 2


def test_a_long_name_does_not_push_the_plot_aside():
    drawn = svg(quality_figure(RUN | {"rows": [BASE, W8 | {"recipe": "x" * 64}]}), "a-")
    assert "x" * 19 + "…" in drawn
    assert "x" * 21 not in drawn


def test_without_verdicts_and_timings_the_rest_is_shown(tmp_path):
    rows = [row | NO_VERDICT | NO_SPEED for row in (BASE, W8)]
    _, reader = page(tmp_path, RUN | {"verification": None, "rows": rows})
    assert reader.tags.count("svg") == 1
    assert "Verdicts" not in reader.text
    assert "0.12" in reader.text


def test_a_verification_that_did_not_come_about_says_why(tmp_path):
    rows = [row | NO_VERDICT | {"verdict": "INCONCLUSIVE"} for row in (BASE, W8)]
    _, reader = page(tmp_path, RUN | {"verification": {"reason": "too few honest runs"}, "rows": rows})
    assert "No verdict was reached: too few honest runs" in reader.text
    assert "comes to no decision on w8" in reader.text
    assert "checked every trace" not in reader.text
    assert "What a verifier sees" not in reader.text


def test_only_the_base_model(tmp_path):
    _, reader = page(tmp_path, RUN | {"verification": None, "rows": [BASE | NO_VERDICT]})
    assert "Only the base model was measured." in reader.text
    assert "svg" not in reader.tags


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [BASE, W8, W4, W1],
            "No difference in perplexity is visible for w8 (the 95 % interval holds zero; one of 0.31 would "
            "show with a probability of 80 %); perplexity is higher than the base model's for w4 and w1; a verifier that expects the base model rejects w4 "
            "and w1 and comes to no decision on w8.",
        ),
        (
            [BASE | NO_VERDICT, W4 | NO_VERDICT | {"ppl_delta_ci": [-2.0, -1.0]}],
            "Perplexity is lower than the base model's for w4.",
        ),
        ([BASE | NO_VERDICT, W4 | NO_VERDICT | {"ppl_delta_ci": None}], "No interval supports a comparison."),
        (
            [BASE | NO_VERDICT, W8 | NO_VERDICT | {"ppl_delta_visible": None}],
            "No difference in perplexity is visible for w8 (the 95 % interval holds zero, and 0.34 too).",
        ),
        (
            [BASE | NO_VERDICT, W8 | NO_VERDICT | {"ppl_delta_ci": [0.0, 0.0], "ppl_delta_visible": None}],
            "Perplexity is the base model's on every window for w8.",
        ),
        (
            [BASE | {"verdict": "FAIL"}, W8 | {"ppl_delta_ci": None, "verdict": "PASS"}],
            "A verifier that expects the base model cannot tell w8 from it; it also rejected the honest base "
            "model, so its verdicts are in doubt.",
        ),
    ],
)
def test_the_headline_claims_only_what_the_run_supports(rows, said):
    verification = None if rows[0]["verdict"] is None else RUN["verification"]
    assert headline(RUN | {"rows": rows, "verification": verification}) == said


def test_the_table_of_an_assay():
    assert render(RUN["rows"][:3], ASSAY, "table") == GOLDEN.read_text().rstrip("\n")
    assert max(map(len, render(RUN["rows"], ASSAY, "table").splitlines())) <= 145


def test_csv_has_the_intervals_and_every_digit():
    header, base, *rest = render(RUN["rows"], ASSAY, "csv").splitlines()
    keys = header.split(",")
    row = dict(zip(keys, rest[0].split(","), strict=True))
    assert {"ppl_ci_low", "ppl_delta_ci_high", "kl_ci_low", "top1_ci_high"} <= set(keys)
    assert (row["ppl_delta_ci_low"], row["ppl_delta_ci_high"]) == ("-0.13", "0.34")
    assert row["size_bytes"] == "163000000"
    assert base.startswith("base,16.0,269000000,22.71,20.1,25.0,0.0")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (0.0166666666, "0.01667"),
        (134_515_008, "134515008"),
        ([1.5, None], "1.5, none"),
        ({"a": 0.25}, "a 0.25"),
    ],
)
def test_values_of_a_run_as_text(value, text):
    assert plain(value) == text


def test_the_picture_of_an_assay(tmp_path):
    write_picture(RUN, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

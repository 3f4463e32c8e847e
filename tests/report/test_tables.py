import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitassay.report.tables import Column, UnshownError, interval, number, percent, render, significant, size

ROWS = [
    {"name": "base", "ppl": 22.7, "ci": None, "note": None},
    {"name": "w2", "ppl": 41234567.0, "ci": [1.5, 2.25], "note": 'a|b, "c"'},
]
COLUMNS = [
    Column("name", "recipe", align="left"),
    Column("ppl", "perplexity\n(nats)", number(2)),
    Column("ci", "95 %", interval(number(1))),
    Column("note", "note", align="left"),
]


def test_a_table_is_aligned_and_shows_what_is_missing():
    assert render(ROWS, COLUMNS, "table") == "\n".join(
        [
            "        perplexity",
            "recipe      (nats)        95 %  note",
            "------  ----------  ----------  --------",
            "base         22.70           -  -",
            'w2        4.12e+07  [1.5, 2.2]  a|b, "c"',
        ]
    )


def test_a_cell_cannot_steer_the_terminal_or_break_its_line():
    rows = [{"name": "a\x1b[2J\nb\u202e", "ppl": 1.0}]
    assert render(rows, COLUMNS[:2], "table").splitlines()[-1] == "a\ufffd[2J\ufffdb\ufffd        1.00"


def test_no_rows_is_a_head_alone():
    assert render([], COLUMNS[:1], "table") == "recipe\n------"
    assert render([], COLUMNS, "csv") == "name,ppl,ci,note\n"


def test_markdown_escapes_bars():
    lines = render(ROWS, COLUMNS, "md").splitlines()
    assert lines[0] == "| recipe | perplexity (nats) | 95 % | note |"
    assert lines[1] == "|---|---:|---:|---|"
    assert lines[3].endswith('| a\\|b, "c" |')


def test_csv_keeps_every_digit_and_splits_intervals():
    rows = list(csv.DictReader(io.StringIO(render(ROWS, COLUMNS, "csv"))))
    assert list(rows[0]) == ["name", "ppl", "ci_low", "ci_high", "note"]
    assert rows[0] == {"name": "base", "ppl": "22.7", "ci_low": "", "ci_high": "", "note": ""}
    assert rows[1]["ci_low"] == "1.5"
    assert rows[1]["ci_high"] == "2.25"
    assert rows[1]["note"] == 'a|b, "c"'


def test_csv_spells_out_what_a_text_also_shows():
    column = Column("kl", "KL", str, interval="kl_ci")
    assert (
        render([{"kl": 0.5, "kl_ci": [0.25, 1]}], [column], "csv") == "kl,kl_ci_low,kl_ci_high\n0.5,0.25,1\n"
    )


def test_csv_does_not_take_any_list_for_an_interval():
    text = render([{"layers": [1, 2]}, {"layers": [1, 2, 3]}], [Column("layers", "layers")], "csv")
    assert list(csv.reader(io.StringIO(text))) == [["layers"], ["[1, 2]"], ["[1, 2, 3]"]]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_csv_numbers_read_back_exactly(value):
    text = render([{"x": value}], [Column("x", "x", number(1))], "csv")
    assert float(text.splitlines()[1]) == value


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (number(2), 999999.0, "999999.00"),
        (number(2), -3e6, "-3.00e+06"),
        (percent(1), 0.9876, "98.8 %"),
        (significant(3), 0.0123456, "0.0123"),
        (size, 999, "999 B"),
        (size, 98_362_432, "98.4 MB"),
        (size, 2.5e12, "2.5 TB"),
    ],
)
def test_forms(form, value, text):
    assert form(value) == text


def test_a_column_may_show_several_fields():
    column = Column("a", "a", lambda row: f"{row['a']}/{row['b']}", whole_row=True)
    assert column.text({"a": 1, "b": 2}) == "1/2"
    assert column.text({"a": None, "b": 2}) == "-"


def test_a_title_in_one_line():
    assert [Column("a", title).heading for title in ("bits/\nweight", "ppl\n[95 %]")] == [
        "bits/weight",
        "ppl [95 %]",
    ]


SHARE = Column("share", "share", percent(1), interval="share_ci", also=("range",), least=0, most=1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"share": 97.1}, "share is 97.1, above 1"),
        ({"share": -0.1}, "share is -0.1, below 0"),
        ({"share": 0.5, "share_ci": [0.6, 0.7]}, r"share is 0.5, outside its interval \[0.6, 0.7\]"),
        ({"share": 0.5, "share_ci": [0.9, 0.1]}, "outside its interval"),
        ({"share": 0.5, "range": [0.1, 0.4]}, "outside its interval"),
        ({"share": 0.5, "share_ci": [0.4]}, "cannot show"),
        ({"share": 0.5, "share_ci": [0.4, 0.5, 0.6]}, "cannot show"),
        ({"share": 0.5, "share_ci": ["a", "b"]}, "cannot show"),
        ({"share": "half"}, "cannot show"),
    ],
)
def test_a_value_that_cannot_be_is_not_shown(row, said):
    with pytest.raises(UnshownError, match=said):
        SHARE.text(row)


def test_rounding_is_no_reason_to_refuse():
    assert SHARE.text({"share": 1 + 1e-12, "share_ci": [0.5, 1]}) == "100.0 % [50.0 %, 100.0 %]"
    assert SHARE.text({"share": -5e-324, "share_ci": None}) == "-0.0 % [—]"


def test_a_text_that_is_none_of_the_choices_is_not_shown():
    column = Column("verdict", "verdict", choices=("PASS", "FAIL"))
    assert column.text({"verdict": "PASS"}) == "PASS"
    with pytest.raises(UnshownError, match="verdict is 'MAYBE', not one of PASS, FAIL"):
        column.text({"verdict": "MAYBE"})

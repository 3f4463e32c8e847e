"""Rows of results as text: an aligned table for a terminal, Markdown, or CSV with raw values.

A Column says which key of a row it shows and how. CSV ignores the formatting: it is for programs, so numbers
keep every digit, an interval becomes two columns, and what is missing is empty.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitassay.errors import BitassayError

MISSING = "-"
NO_INTERVAL = "[\N{EM DASH}]"
DECIDED = {True: "yes", False: "no", None: "not decided"}
Row = dict[str, Any]


class UnshownError(BitassayError):
    """A row that does not hold what its column shows."""


@dataclass(frozen=True)
class Column:
    """`format` gets the value under `key`, or the whole row where `whole_row` is set. `also`: other keys that
    the text shows, which are columns of their own in CSV. A title may have several lines."""

    key: str
    title: str
    format: Callable[[Any], str] = str
    align: Literal["left", "right"] = "right"
    whole_row: bool = False
    also: tuple[str, ...] = ()

    def text(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return MISSING
        try:
            return self.format(row if self.whole_row else value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UnshownError(f"{self.key} is {value!r:.60}, which its column cannot show") from error


def with_interval(
    key: str, title: str, form: Callable[[float], str], interval_key: str | None = None
) -> Column:
    """A value and, in brackets, its interval (under KEY_ci, if nothing else is said)."""
    pair_key = interval_key or f"{key}_ci"
    return Column(
        key,
        title,
        lambda row: f"{form(row[key])} {interval(form)(row.get(pair_key))}",
        whole_row=True,
        also=(pair_key,),
    )


def interval_note(cells: Sequence[Sequence[str]]) -> str:
    """Why there are cells without an interval; empty where there are none."""
    from bitassay.evaluation.statistics import FEWEST  # takes scipy along, which most tables do without

    if not any(NO_INTERVAL in text for row in cells for text in row):
        return ""
    return (
        f"{NO_INTERVAL} no interval: fewer than {FEWEST} values (windows, prompts, rounds; of a median 6), "
        "or values without spread"
    )


def render(rows: Sequence[Row], columns: Sequence[Column], format: Literal["table", "csv", "md"]) -> str:
    """The rows in one of the three formats; `table` never cuts a value, however narrow the terminal is."""
    if format == "csv":
        return _csv(rows, columns)
    cells = [[column.text(row) for column in columns] for row in rows]
    text = _markdown(cells, columns) if format == "md" else _table(cells, columns)
    note = interval_note(cells)
    return f"{text}\n\n{note}" if note else text


def pivot(rows: Sequence[Mapping[str, Any]], down: str, across: str) -> list[Row]:
    """One row for each value under `down`, with the whole of each given row under its value of `across`."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row[down], {down: row[down]})[row[across]] = row
    return list(found.values())


def _table(cells: list[list[str]], columns: Sequence[Column]) -> str:
    titles = [column.title.split("\n") for column in columns]
    height = max(map(len, titles))
    heads = [[""] * (height - len(title)) + title for title in titles]
    lines = [[head[line] for head in heads] for line in range(height)]
    lines += [[printable(text) for text in row] for row in cells]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    drawn = [
        "  ".join(
            text.ljust(width) if column.align == "left" else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*drawn[:height], "  ".join("-" * width for width in widths), *drawn[height:]])


def printable(text: str) -> str:
    """`text` without line breaks, and without what could move a terminal's cursor or hide other text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _markdown(cells: list[list[str]], columns: Sequence[Column]) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    rule = "|" + "|".join("---" if column.align == "left" else "---:" for column in columns) + "|"
    return "\n".join([line([column.title for column in columns]), rule, *map(line, cells)])


def _csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in (column.key, *column.also)))
    pairs = {key for key in keys if _holds_pairs([row.get(key) for row in rows])}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [name for key in keys for name in ([f"{key}_low", f"{key}_high"] if key in pairs else [key])]
    )
    for row in rows:
        values: list[Any] = []
        for key in keys:
            value = row.get(key)
            values += (value or [None, None]) if key in pairs else [value]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


def _holds_pairs(values: list[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, (list, tuple)) and len(value) == 2 for value in present)


def number(digits: int) -> Callable[[float], str]:
    """Fixed decimals; scientific notation from a million on, where decimals say nothing."""
    return lambda value: f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def significant(digits: int) -> Callable[[float], str]:
    """So many significant digits; 0 for the numbers next to it that a float knows."""
    return lambda value: f"{0.0 if abs(value) < 1e-300 else value:.{digits}g}"


def percent(digits: int) -> Callable[[float], str]:
    """A fraction as a percentage."""
    return lambda value: f"{value * 100:.{digits}f} %"


def size(value: float) -> str:
    """Bytes in decimal units: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def interval(form: Callable[[float], str]) -> Callable[[Sequence[float] | None], str]:
    """`[low, high]`, both in the same form; NO_INTERVAL for None."""
    return lambda pair: NO_INTERVAL if pair is None else f"[{form(pair[0])}, {form(pair[1])}]"

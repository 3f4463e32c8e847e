"""Rows of results as an aligned table for a terminal, Markdown, CSV with raw values, or cells of a page.

A Column says which key of a row it shows and how; `columns.py` has those of every kind of run. CSV ignores
the formatting: it is for programs, so numbers keep every digit, an interval becomes two columns, and what is
missing is empty.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitassay.errors import BitassayError
from bitassay.record.text import escaped

MISSING = "-"
ROUNDING = 1e-9  # by so much, a value may be outside what holds it
NO_INTERVAL = "[\N{EM DASH}]"
DECIDED = {True: "yes", False: "no", None: "not decided"}
Row = Mapping[str, Any]
Run = Mapping[str, Any]
Format = Callable[[Any], str]


class UnshownError(BitassayError):
    """A row does not hold what its column shows."""


@dataclass(frozen=True)
class Cell:
    """A cell of a page. small: below the text, such as an interval; mark: the rest of the text, marked;
    shade: 0 to 1, how strongly the cell is coloured; hint: what a pointer over the cell shows."""

    text: str
    small: str = ""
    mark: str = ""
    shade: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Column:
    """How one key of a row is shown.

    format: of the value under `key`, or of the whole row where `whole_row` is set. interval: the key of the
    interval behind the value. also: further keys that CSV has. least, most: what a number lies between.
    choices: all values that there are. instead: the text of a row whose value is not to be shown, None for
    other rows. cell: the cell of a page, from the value. A title may have lines.
    """

    key: str
    title: str
    format: Format = str
    align: Literal["left", "right"] = "right"
    interval: str = ""
    also: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    whole_row: bool = False
    instead: Callable[[Row], str | None] | None = None
    cell: Callable[[Any], Cell] | None = None

    def text(self, row: Row) -> str:
        """Return the text of a row's cell. Raises UnshownError."""
        cell = self._cell(row, None)
        return f"{cell.text} {cell.small}" if cell.small else cell.text

    def shown(self, row: Row) -> Cell:
        """Return a row's cell of a page. Raises UnshownError."""
        return self._cell(row, self.cell)

    def _cell(self, row: Row, draw: Callable[[Any], Cell] | None) -> Cell:
        value = row.get(self.key)
        try:
            if self.instead is not None and (text := self.instead(row)) is not None:
                return Cell(text)
            if value is None:
                return Cell(MISSING)
            self._check(value, row)
            if draw is not None:
                return draw(value)
            ends = interval(self.format)(row.get(self.interval)) if self.interval else ""
            return Cell(self.format(row if self.whole_row else value), ends)
        except UnshownError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UnshownError(f"{self.key} is {value!r:.60}, which its column cannot show") from error

    def _check(self, value: Any, row: Row) -> None:
        """Raise UnshownError for a value that cannot be, and for an interval that does not hold it."""
        if self.choices and value not in self.choices:
            raise UnshownError(f"{self.key} is {value!r:.60}, not one of {', '.join(self.choices)}")
        if not isinstance(value, int | float):
            return
        if value < self.least - ROUNDING or value > self.most + ROUNDING:
            bound = f"below {self.least:g}" if value < self.least else f"above {self.most:g}"
            raise UnshownError(f"{self.key} is {value!r:.60}, {bound}")
        for key in (self.interval, *self.also):
            if isinstance(ends := row.get(key), list | tuple):
                low, high = ends
                rounding = ROUNDING * max(1, abs(low), abs(high))
                if not low - rounding <= value <= high + rounding:
                    raise UnshownError(
                        f"{self.key} is {value!r:.60}, outside its interval [{low:g}, {high:g}]"
                    )

    @property
    def heading(self) -> str:
        """The title in one line."""
        return self.title.replace("/\n", "/").replace("\n", " ")

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *([self.interval] if self.interval else []), *self.also)


def shown_columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the columns that some row has something in; all where there are no rows."""
    empty = (MISSING, "")
    return [column for column in columns if not rows or any(column.text(row) not in empty for row in rows)]


def interval_note(texts: Sequence[str]) -> str:
    """Return why some of the cells have no interval; empty where all have theirs."""
    from bitassay.evaluation.statistics import FEWEST  # takes scipy along, which most tables do without

    if not any(NO_INTERVAL in text for text in texts):
        return ""
    return (
        f"{NO_INTERVAL} no interval: fewer than {FEWEST} values (windows, prompts, rounds; of a median 6), "
        "or values without spread"
    )


def render(rows: Sequence[Row], columns: Sequence[Column], format: Literal["table", "csv", "md"]) -> str:
    """Return the rows in one of three formats; `table` never cuts a value, however narrow the terminal is."""
    if format == "csv":
        return _csv(rows, columns)
    cells = [[column.text(row) for column in columns] for row in rows]
    text = _markdown(cells, columns) if format == "md" else _table(cells, columns)
    note = interval_note([text for row in cells for text in row])
    return f"{text}\n\n{note}" if note else text


def pivot(rows: Sequence[Row], down: str, across: str) -> list[dict[str, Any]]:
    """Return a row for each value under `down`, which has each given row under its value of `across`."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(row[down], {down: row[down]})[row[across]] = row
    return list(lines.values())


def _table(cells: list[list[str]], columns: Sequence[Column]) -> str:
    titles = [column.title.split("\n") for column in columns]
    height = max(map(len, titles))
    heads = [[""] * (height - len(title)) + title for title in titles]
    lines = [[head[line] for head in heads] for line in range(height)]
    lines += [[printable(text) for text in row] for row in cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    drawn = [
        "  ".join(
            text.ljust(width) if column.align == "left" else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*drawn[:height], "  ".join("-" * width for width in widths), *drawn[height:]])


def printable(text: str) -> str:
    """Return `text` without line breaks and what could move a terminal's cursor or hide other text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _markdown(cells: list[list[str]], columns: Sequence[Column]) -> str:
    def line(texts: Sequence[str]) -> str:
        shown = (escaped(text.replace("|", "\\|").replace("\n", " ")) for text in texts)
        return "| " + " | ".join(shown) + " |"

    rule = "|" + "|".join("---" if column.align == "left" else "---:" for column in columns) + "|"
    return "\n".join([line([column.heading for column in columns]), rule, *map(line, cells)])


def _csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in column.keys))
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
    return escaped(out.getvalue())


def _holds_pairs(values: list[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, (list, tuple)) and len(value) == 2 for value in present)


def number(digits: int) -> Format:
    """Return a format of fixed decimals; scientific from a million on, where decimals say nothing."""
    return lambda value: f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def significant(digits: int) -> Format:
    """Return a format of so many digits; 0 for numbers that only a float tells from it."""
    return lambda value: f"{0.0 if abs(value) < 1e-300 else value:.{digits}g}"


def percent(digits: int) -> Format:
    """Return a format of fractions as percentages."""
    return lambda value: f"{value * 100:.{digits}f} %"


def points(value: float) -> str:
    """Return a difference of fractions as percentage points with a sign."""
    return f"{value * 100:+.1f}"


def size(value: float) -> str:
    """Return bytes in decimal units: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def interval(form: Format) -> Callable[[Sequence[float] | None], str]:
    """Return a format `[low, high]` of intervals; NO_INTERVAL for None."""

    def show(pair: Sequence[float] | None) -> str:
        if pair is None:
            return NO_INTERVAL
        low, high = pair
        if low > high:
            raise ValueError(pair)
        return f"[{form(low)}, {form(high)}]"

    return show


def plain(value: Any) -> str:
    """Return any value of a run as text: numbers to four digits, lists and objects spelled out."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {plain(item)}" for key, item in value.items())
    return str(value)

"""Write results: tables to stdout in the format that was asked for."""

import json as json_module
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bitassay.record.text import escaped
from bitassay.report.tables import Column, Row, render

Format = Literal["table", "json", "csv", "md"]
Rows = Sequence[Row]
Table = tuple[Rows, Sequence[Column | str]]
"""Rows, and the columns to show. A bare key is a column titled like the key, with text on the left."""


def print_tables(
    tables: Sequence[Table],
    format: Format,
    *,
    csv: Table | None = None,
    json: Mapping[str, Any] | None = None,
) -> None:
    """Print tables with an empty line between them, leaving out those without rows but for the first.

    CSV holds one table: `csv`, or the first. JSON is one object: `json`, or `{"rows": rows of the first}`.
    """
    if format == "json":
        content = {"rows": tables[0][0]} if json is None else json
        text = escaped(json_module.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    elif format == "csv":
        rows, columns = csv or tables[0]
        text = render(rows, as_columns(rows, columns), "csv").rstrip("\n")
    else:
        shown = [(rows, columns) for rows, columns in tables if rows] or tables[:1]
        texts = [render(rows, as_columns(rows, columns), format) for rows, columns in shown]
        text = "\n\n".join(part.rstrip("\n") for part in texts)
    sys.stdout.write(text + "\n")


def as_columns(rows: Rows, columns: Sequence[Column | str]) -> list[Column]:
    """Return the columns, with those given by their key alone filled in."""
    return [column if isinstance(column, Column) else _column(rows, column) for column in columns]


def _column(rows: Rows, key: str) -> Column:
    is_text = any(isinstance(row.get(key), str | bool) for row in rows)
    return Column(key, key.replace("_", " "), _text, align="left" if is_text else "right")


def _text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

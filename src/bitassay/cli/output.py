"""Write a result to stdout in the format that was asked for, and the page of a run beside it."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bitassay.report.tables import Column, Row, render, shown_columns

Format = Literal["table", "json", "csv", "md"]


def emit(
    rows: Sequence[Row],
    columns: Sequence[Column],
    format: Format,
    whole: Mapping[str, Any] | None = None,
) -> None:
    """Print `rows`; as JSON, the object `whole` (default: `{"rows": rows}`), which is the only thing on
    stdout."""
    if format == "json":
        value = {"rows": rows} if whole is None else whole
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    else:
        text = render(rows, columns, format)
    sys.stdout.write(text.rstrip("\n") + "\n")


def emit_run(run: Mapping[str, Any], format: Format, page: Path | None = None) -> None:
    """Print the tables of a run, or as CSV its main table, or as JSON all of it; write its page to `page` and
    say so on stderr."""
    from bitassay.report.page import write_page
    from bitassay.report.pages import page_of

    content = page_of(run)
    if page is not None:
        write_page([content], page)
    if format == "json":
        emit([], [], format, run)
    elif format == "csv":
        emit(*content.csv, format)
    else:
        tables = [section for section in content.sections if section.place != "page" and section.rows]
        for index, section in enumerate(tables):
            sys.stdout.write("\n" if index else "")
            emit(section.rows, shown_columns(section.columns, section.rows), format)
    if page is not None:
        print(f"report: {page}", file=sys.stderr)

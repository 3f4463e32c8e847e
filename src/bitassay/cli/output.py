"""Write a result to stdout in the format that was asked for."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from bitassay.report.tables import Column, render

Format = Literal["table", "json", "csv", "md"]


def emit(
    rows: list[dict[str, Any]], columns: Sequence[Column], format: Format, whole: dict[str, Any] | None = None
) -> None:
    """Print `rows`; as JSON, the object `whole` (default: `{"rows": rows}`), which is the only thing on
    stdout."""
    if format == "json":
        text = json.dumps(
            whole if whole is not None else {"rows": rows}, indent=2, ensure_ascii=False, allow_nan=False
        )
    else:
        text = render(rows, columns, format)
    sys.stdout.write(text.rstrip("\n") + "\n")

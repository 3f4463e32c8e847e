"""Claims and their verdicts as a table."""

from collections.abc import Callable
from typing import Any

from bitassay.report.tables import Column, interval, significant

Row = dict[str, Any]


def points(value: float) -> str:
    """A fraction as percentage points."""
    return f"{value * 100:+.1f}"


_UNITS: dict[str, Callable[[float], str]] = {
    "points": points,
    "%": lambda value: f"{value * 100:+.1f} %",
    "perplexity": lambda value: f"{value:+.3f}",
    "nats of KL": lambda value: f"{value:+.2g}",
    "ratio": significant(3),
}


def _measured(row: Row) -> str:
    form = _UNITS[row["unit"]]
    parts = [
        f"{one['name']}: {form(one['value'])} {interval(form)(one['interval'])}" for one in row["measured"]
    ]
    if row["not_measured"]:
        parts.append(f"{row['not_measured']} not measured here")
    return "; ".join(parts)


CLAIM_COLUMNS = [
    Column("section", "section", align="left"),
    Column("claim", "claim", align="left"),
    Column("expected", "expected", align="left"),
    Column("verdict", "verdict", align="left"),
    Column("measured", "measured", _measured, align="left", whole_row=True),
]
SHORT_CLAIM_COLUMNS = CLAIM_COLUMNS[:4]

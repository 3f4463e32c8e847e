"""Tasks for people: the columns of their table."""

from collections.abc import Callable
from typing import Any

from bitassay.report.tables import Column, interval, number, percent, significant

RowText = Callable[[dict[str, Any]], str]


def _value(row: dict[str, Any]) -> str:
    """A share of items in percent, anything else as it is, with its interval."""
    is_share = row["metric"].split(" ")[0] in ("acc", "acc_norm", "exact_match")
    form = percent(1) if is_share else significant(4)
    return form(row["value"]) + (f" {interval(form)(row['value_ci'])}" if row["value_ci"] else "")


def _points(value: float) -> str:
    return f"{value * 100:+.1f}"


def _difference(row: dict[str, Any]) -> str:
    return f"{_points(row['difference'])} {interval(_points)(row['difference_ci'])}"


TASK_COLUMNS = [
    Column("protocol", "protocol", align="left"),
    Column("metric", "metric", align="left"),
    Column("model", "model", align="left"),
    Column("n", "items"),
    Column("value", "value\n[95 %]", _value, whole_row=True, also=("value_ci",)),
    Column("unparsed", "unparsed"),
    Column("difference", "points to base\n[95 %]", _difference, whole_row=True, also=("difference_ci",)),
    Column("lost", "lost"),
    Column("gained", "gained"),
    Column("p_value", "p\nMcNemar", significant(2)),
    Column("p_holm", "p\nHolm", significant(2)),
    Column("visible_difference", "visible\npoints", lambda value: number(1)(value * 100)),
]

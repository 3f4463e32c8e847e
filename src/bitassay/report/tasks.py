"""Tasks for people: the columns of their table, and one HTML file that opens offline."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitassay.report.bench import page_table, write_tables
from bitassay.report.tables import Column, interval, number, percent, significant

RowText = Callable[[dict[str, Any]], str]


def _value(row: dict[str, Any]) -> str:
    """A share of items in percent, anything else as it is, with its interval."""
    is_share = row["metric"].split(" ")[0] in ("acc", "acc_norm", "exact_match")
    form = percent(1) if is_share else significant(4)
    return f"{form(row['value'])} {interval(form)(row['value_ci'])}"


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
PROTOCOL_COLUMNS = [
    Column("id", "protocol", align="left"),
    Column("tasks", "tasks"),
    Column("items", "items"),
    Column("harness", "by", align="left"),
    Column("sources", "questions", ", ".join, align="left"),
]


def write_tasks_report(run: Mapping[str, Any], path: Path) -> None:
    """One HTML file of a run of `eval --tasks`."""
    base = next(iter(run["models"]))
    lead = [
        f"What share of questions each model answers rightly, beside {base}, on the same items. "
        f"Intervals: {run['interval']}. Test: {run['test']}. Visible points: the smallest difference "
        f"{run['visible_difference']}.",
        f"Run {run['run_id']}, {run['created']}.",
    ]
    tables = [
        page_table("Tasks", TASK_COLUMNS, run["rows"]),
        page_table("Protocols", PROTOCOL_COLUMNS, list(run["protocols"].values())),
    ]
    write_tables(
        path, f"Tasks: {', '.join(run['models'])}", lead, [], tables, run["environment"] or run["versions"]
    )

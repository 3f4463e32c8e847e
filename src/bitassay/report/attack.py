"""Attacks against detectors for people: a matrix for the terminal, and one HTML file with a heat map."""

from pathlib import Path
from typing import Any

from bitassay.report.page import write_page
from bitassay.report.tables import Column, interval, number, percent, pivot, significant

ATTACK_COLUMNS = [
    Column("attack", "attack", align="left"),
    Column("detector", "detector", align="left"),
    Column("auc", "AUC", number(3)),
    Column("tpr_at_1pct_fpr", "caught", percent(1)),
    Column("tpr_ci", "95 % interval", interval(percent(1))),
    Column("tokens_to_99", "tokens\nto 99 %"),
    Column("bytes_per_token", "bytes\na token", significant(3)),
    Column("seconds_per_token", "seconds\na token", significant(3)),
    Column("prover_seconds_per_token", "host's seconds\na token", significant(3)),
    Column("prefill_seconds_per_token", "prefill seconds\na token", significant(3)),
    Column("n_honest", "honest"),
    Column("n_attacked", "attacked"),
    Column("sees", "sees", align="left"),
]


COST_COLUMNS = [
    Column("sampler", "sampler", align="left"),
    Column("detector", "detector", align="left"),
    Column("bytes_per_token", "bytes\na token", significant(3)),
    Column("seconds_per_token", "verifier's seconds\na token", significant(2)),
    Column("prefill_seconds_per_token", "its prefill\na token", significant(2)),
    Column("prover_seconds_per_token", "host's seconds\na token", significant(2)),
]


def detectors_of(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["detector"] for row in run["rows"]))


def matrix(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an attack: under each detector's name its cell of the study."""
    return pivot(run["rows"], "attack", "detector")


def matrix_columns(run: dict[str, Any]) -> list[Column]:
    """`100 % @8`: the share that is caught with all tokens, and the tokens from which on 99 % are."""
    titles = {name: name.replace("-", "-\n") for name in detectors_of(run)}
    return [Column("attack", "attack", align="left")] + [
        Column(name, title, cell) for name, title in titles.items()
    ]


def cell(row: dict[str, Any]) -> str:
    """A cell of the matrix. `blind` where the interval of the share that is caught reaches down to alpha."""
    if row["sees"] == "nothing":
        return "blind"
    tokens = f" @{row['tokens_to_99']}" if row["tokens_to_99"] else ""
    return f"{percent(0)(row['tpr_at_1pct_fpr'])}{tokens}"


def write_attack_report(run: dict[str, Any], path: Path) -> None:
    """One HTML file that opens offline."""
    filters = {"percent": percent(1), "cell": cell, "two": significant(2)}
    found = {"run": run, "rows": matrix(run), "detectors": detectors_of(run)}
    write_page(path, "attack.html.j2", filters=filters, **found)

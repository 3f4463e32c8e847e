"""The experiments for people: tables for the terminal, and one HTML file that opens offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bitassay.report.bench import one_line
from bitassay.report.figures import COLOURS, MARKERS, STYLE, svg
from bitassay.report.page import write_page
from bitassay.report.tables import (
    Column,
    interval,
    interval_note,
    number,
    percent,
    pivot,
    significant,
    with_interval,
)

EXPERIMENT_COLUMNS = [
    Column("study", "study", align="left"),
    Column("prover", "prover", align="left"),
    Column("verifier", "verifier", align="left"),
    Column("expected", "accept rate\nexpected", interval(percent(0))),
    with_interval("avg_accept_rate", "accept rate\nmeasured [95 %]", percent(1), "accept_rate_ci"),
    Column("as_expected", "as\nexpected", lambda yes: "yes" if yes else "no"),
    Column("pass_rate", "trials that\npass", percent(0)),
    Column("avg_overhead_percentage", "overhead\n%", number(2)),
    Column("refused", "refused at this bar", lambda found: ", ".join(f"{k} {v}" for k, v in found.items())),
    Column("avg_relative_distance", "relative\ndistance", significant(2)),
]
THRESHOLD_COLUMNS = [
    Column("study", "study", align="left"),
    Column("direction", "direction", align="left"),
    Column("Pe", "Pe\nmax", significant(3)),
    Column("Pm", "Pm\nmin", significant(3)),
    Column("Pw", "Pw\nmin", significant(3)),
    Column("mean_epsilon", "mean error\nmax", significant(2)),
    Column("accept_rate_min", "accept rate\nmin", percent(1)),
    Column("false_positive_rate", "honest\nrefused", percent(1)),
    Column("false_positive_ci", "95 % interval", interval(percent(1))),
    Column("caught", "attacks caught", align="left"),
    Column("caught_by_distance", "by relative distance", align="left"),
]
STATISTICS = ("Pe", "Pm", "Pw", "mean_error", "accept_rate")


def threshold_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a direction."""

    def caught(row: Mapping[str, Any], key: str) -> str:
        return ", ".join(f"{name} {percent(0)(one[key])}" for name, one in row["attacks"].items())

    return [
        {
            **{key: row[key] for key in ("study", "direction", "false_positive_rate", "false_positive_ci")},
            **row["thresholds"],
            "caught": caught(row, "caught"),
            "caught_by_distance": caught(row, "caught_by_distance"),
        }
        for row in run["rows"]
    ]


def separability_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrix: a line for each verifier, under each prover's name its cell."""
    return pivot(run["rows"], "verifier", "prover")


def separability_columns(run: Mapping[str, Any]) -> list[Column]:
    provers = dict.fromkeys(row["prover"] for row in run["rows"])
    return [Column("verifier", "verifier", align="left")] + [Column(one, one, separated) for one in provers]


def separated(row: Mapping[str, Any]) -> str:
    """The share that is refused; the verifier's own precision is honest."""
    return "honest" if row["honest"] else percent(0)(row["tpr_at_fpr"])


def experiment_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accept rates with their intervals, and the bands that were expected."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.7 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            low, high = row["expected"]
            label = "expected" if y == 0 else None
            axes.barh(y, high - low, left=low, height=0.7, color=COLOURS[6], alpha=0.5, label=label)
            rate, ends = row["avg_accept_rate"], row["accept_rate_ci"] or (row["avg_accept_rate"],) * 2
            axes.plot(ends, (y, y), color=COLOURS[0], lw=1.5)
            axes.plot(rate, y, "o", color=COLOURS[0], label="measured" if y == 0 else None)
            for index, (name, one) in enumerate(row["detection"].items()):
                axes.plot(
                    one["avg_accept_rate"],
                    y,
                    MARKERS[(index + 1) % len(MARKERS)],
                    color=COLOURS[(index + 1) % len(COLOURS)],
                    ms=5,
                    label=f"prover {name}" if y == 0 else None,
                )
        axes.set_yticks(
            range(len(rows)), [f"{row['study']}: {row['prover']} → {row['verifier']}" for row in rows]
        )
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("cells accepted")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def distribution_figure(row: Mapping[str, Any]) -> Figure:
    """Histograms of each statistic, honest runs and attacks, with the threshold."""
    limits = row["thresholds"]
    lines = dict(zip(STATISTICS, ("Pe", "Pm", "Pw", "mean_epsilon", "accept_rate_min"), strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.2), layout="constrained")
        grid = figure.subplots(2, 3).ravel()
        for axes, statistic in zip(grid, STATISTICS, strict=False):
            for index, (name, found) in enumerate(row["distributions"].items()):
                one = found[statistic]
                if one["n"]:
                    counts = np.array(one["histogram"]["counts"]) / one["n"]
                    axes.stairs(
                        counts, one["histogram"]["edges"], color=COLOURS[index % len(COLOURS)], label=name
                    )
            axes.axvline(limits[lines[statistic]], color=COLOURS[0], ls="--", lw=1)
            axes.set_xlabel(statistic)
            axes.set_yticks([])
        handles, labels = grid[0].get_legend_handles_labels()
        grid[-1].axis("off")
        grid[-1].legend(handles, labels, frameon=False, title="prover", loc="center")
    return figure


def write_study_report(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One HTML file of experiments, separability and thresholds, in the order given."""
    sections = [_section(run, index) for index, run in enumerate(runs)]
    write_page(path, "study.html.j2", filters={}, sections=sections, model=runs[0]["model"])


def _section(run: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Title, text, figures and table of one run."""
    if run["kind"] == "experiments":
        figures = [experiment_figure(run["rows"])] if run["rows"] else []
        rows, columns, title = run["rows"], EXPERIMENT_COLUMNS, "Experiments"
        text = (
            "Share of hidden-state cells that verifiers accept by fixed thresholds, beside what the "
            "experiment documents expect. A bar that a quantized prover passes is one that a cheat passes."
        )
    elif run["kind"] == "separability":
        rows, columns, title = separability_rows(run), separability_columns(run), "Separability"
        figures = []
        text = (
            f"Share of {run['trials']} runs of each prover that a verifier refuses by relative distance, "
            f"with {run['tokens']} tokens, at a false-positive rate of {run['alpha']:g} for its own."
        )
    else:
        figures = [distribution_figure(row) for row in run["rows"]]
        rows, columns, title = threshold_rows(run), THRESHOLD_COLUMNS, "Thresholds"
        text = "Fitted on honest runs alone; attacks were only judged. Dashed lines are the thresholds."
    cells = [[column.text(row) for column in columns] for row in rows]
    return {
        "title": title,
        "text": text,
        "figures": [svg(figure, f"s{index}f{number}-") for number, figure in enumerate(figures)],
        "header": [one_line(column.title) for column in columns],
        "rows": cells,
        "note": interval_note(cells),
        "missing": run.get("missing", []),
        "left_out": run.get("left_out", []),
        "created": run["created"],
    }

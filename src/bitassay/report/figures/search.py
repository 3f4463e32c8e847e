"""The plots of a search: its trials by objective, and which parameter mattered."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bitassay.report.figures.drawing import COLOURS, INK, STYLE
from bitassay.report.tables import Row, printable

Run = Mapping[str, Any]


@mpl.rc_context(STYLE)
def pareto_figure(run: Run) -> Figure:
    """Draw every complete trial by its first two objectives, or by size where there is one; the best
    joined."""
    objectives, space = run["settings"]["objectives"], run["settings"]["space"]["name"]
    best: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []

    def point_of(trial: Row) -> tuple[float, float]:
        values = trial["objectives"]
        return (values[1] if len(objectives) > 1 else trial["row"]["bits_per_weight"]), values[0]

    for trial in run["trials"]:
        if trial["state"] == "complete":
            chosen = f"{space}-{trial['number']:03d}" in run["best"]
            (best if chosen else others).append(point_of(trial))
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot()
    if others:
        axes.plot(*zip(*others, strict=True), "o", color=INK, alpha=0.45, label="complete trials")
    if best:
        axes.plot(*zip(*sorted(best), strict=True), "D-", color=COLOURS[2], label="best")
    across = objectives[1] if len(objectives) > 1 else "bits_per_weight"
    axes.set(xlabel=printable(across), ylabel=printable(objectives[0]))
    axes.legend(frameon=False)
    return figure


@mpl.rc_context(STYLE)
def importance_figure(run: Run) -> Figure | None:
    """Draw the share of each parameter in each objective; None where no importance is known."""
    known = {objective: shares for objective, shares in run["importance"].items() if shares}
    if not known:
        return None
    names = list(next(iter(known.values())))
    figure = Figure(figsize=(7.5, 0.8 + 0.3 * len(names) * len(known)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(known)
    for index, (objective, shares) in enumerate(known.items()):
        positions = [row + index * height for row in range(len(names))]
        values = [shares.get(name, 0.0) for name in names]
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.barh(positions, values, height=height, color=colour, label=printable(objective))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], list(map(printable, names)))
    axes.invert_yaxis()
    axes.set(xlabel="share of importance", xlim=(0, 1))
    axes.legend(frameon=False)
    return figure

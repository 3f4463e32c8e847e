"""Plots of audits: each answer's log ratio beside those of honest servers; what a watch proves over time."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitassay.report.figures.drawing import COLOURS, INK, STYLE, legend_outside

Run = Mapping[str, Any]


@mpl.rc_context(STYLE)
def audit_figure(run: Run) -> Figure | None:
    """Draw the audited answers in their order beside the band that honest answers span; None without
    answers."""
    rows = [row for row in run["rows"] if row["score"] is not None]
    if not rows:
        return None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    calibration = run["calibration"]
    if calibration:
        scores = np.array(calibration["scores"], dtype=np.float64)
        axes.axhspan(scores.min(), scores.max(), color=INK, alpha=0.1, label="honest servers")
        axes.axhline(float(np.median(scores)), color=INK, lw=0.8, ls="--")
    axes.plot(
        [row["request"] for row in rows],
        [row["score"] for row in rows],
        "o",
        color=COLOURS[1],
        ms=5,
        label="audited",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="request", ylabel="log ratio to the control")
    legend_outside(axes)
    return figure


@mpl.rc_context(STYLE)
def watch_figure(run: Run) -> Figure | None:
    """Draw the p-value of all requests after each audit, and alpha; None without audits."""
    if not run["rows"]:
        return None
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.add_subplot()
    p_values = [max(row["p_value"], 1e-30) for row in run["rows"]]
    audits = [row["audit"] for row in run["rows"]]
    axes.step(audits, p_values, "o-", where="post", color=COLOURS[1], ms=4, label="all requests")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(run["decision"]["alpha"], color=INK, lw=0.8, ls="--", label="alpha")
    axes.set(xlabel="audit", ylabel="p-value", yscale="log")
    legend_outside(axes)
    return figure

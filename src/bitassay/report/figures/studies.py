"""The plots of studies, searches and audits.
Where generated texts diverge, accuracy by granularity, replicas against what they cost, accept rates and the
statistics behind thresholds; trials by objective, and which parameter mattered; each answer's log ratio and
those of honest servers, and what a watch proves over time."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitassay.report.figures.drawing import (
    COLOURS,
    INK,
    STYLE,
    label_points,
    legend_outside,
    names_of,
    panel,
    style,
)
from bitassay.report.tables import Row, Run, printable


@mpl.rc_context(STYLE)
def divergence_figure(run: Run) -> Figure:
    """Draw, for each model, the share of texts that are still the base model's after so many tokens."""
    figure, axes = panel(8, 3.6)
    base, *others = run["texts"]
    tokens = np.arange(min(run["settings"]["max_new_tokens"], 100_000) + 1)
    for index, name in enumerate(others):
        texts = run["texts"][name]
        prefix = np.array([text["prefix_tokens"] for text in texts])
        identical = [
            text["tokens"] == reference["tokens"] == text["prefix_tokens"]
            for text, reference in zip(texts, run["texts"][base], strict=True)
        ]
        share = [(np.array(identical) | (prefix >= at)).mean() for at in tokens]
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.step(tokens, share, where="post", color=colour, label=printable(name))
    axes.set(xlabel="tokens written", ylabel="texts equal to the base's so far", ylim=(-0.02, 1.02))
    legend_outside(axes)
    return figure


@mpl.rc_context(STYLE)
def granularity_figure(run: Run) -> Figure | None:
    """Draw accuracy and divergence against granularity, with intervals, INT8 beside FP8, fake models; the
    band is the base's. None where there are fewer than two granularities."""
    base = run["rows"][0]
    rows = [row for row in run["rows"] if row["kind"] == "fake" and row["refused"] is None]
    sizes = list(dict.fromkeys(str(row["granularity"]) for row in rows))
    if len(sizes) < 2:
        return None
    panels = {
        "direct_acc": ("MMLU, direct", "direct_acc_ci"),
        "generate_acc": ("MMLU, generate", "generate_acc_ci"),
    }
    if rows[0].get("kl_mean") is not None:
        panels["kl_mean"] = ("KL to base, nats", "kl_ci")
        panels["ppl_delta"] = ("perplexity delta", "ppl_delta_ci")
    figure = Figure(figsize=(9, 3.2 * (len(panels) // 2)), layout="constrained")
    grid = figure.subplots(len(panels) // 2, 2, squeeze=False).ravel()
    for axes, (key, (title, interval)) in zip(grid, panels.items(), strict=True):
        for index, format in enumerate(("int8", "fp8")):
            format_rows = [row for row in rows if row["format"] == format]
            x = [sizes.index(str(row["granularity"])) + 0.16 * (index - 0.5) for row in format_rows]
            ends = [row.get(interval) or (row[key], row[key]) for row in format_rows]
            colour = COLOURS[index + 1]
            axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=colour, lw=1.3)
            axes.plot(x, [row[key] for row in format_rows], "os"[index], color=colour, ms=5, label=format)
        axes.set(ylabel=title)
        axes.set_xticks(range(len(sizes)), sizes)
        if key.endswith("acc"):
            label = f"{printable(base['variant'])}, 95 %"
            axes.axhspan(*base[interval], color=INK, alpha=0.08, label=label)
    legend_outside(grid[1])
    return figure


COSTS = {
    "bits stored a weight": ("bits_per_weight", 1.0),
    "FLOP a token, millions": ("flop_per_token", 1e-6),
    "weights read a token, MB": ("bytes_per_token", 1e-6),
}


@mpl.rc_context(STYLE)
def costs_figure(run: Run) -> Figure | None:
    """Draw divergence against bits, FLOP and bytes: replicas filled, with a line from each to every control;
    what has no controls hollow. None where nothing diverges."""
    rows = [row for row in run["rows"] if row["kl_mean"] > 0]
    if not rows:
        return None
    figure = Figure(figsize=(9, 4.2 * len(COSTS)), layout="constrained")
    for axes, (label, (key, unit)) in zip(figure.subplots(len(COSTS), 1), COSTS.items(), strict=True):
        for index, group in enumerate(names_of(rows, "group")):
            group_rows = [row for row in rows if row["group"] == group]
            _replica_and_controls(axes, group_rows, key, unit, COLOURS[1 + index % (len(COLOURS) - 1)])
        axes.set(xlabel=label, ylabel="KL to the base, nats", yscale="log")
        axes.margins(x=0.15)
        heads = [row for row in rows if row["role"] in ("replica", "plain")]
        label_points(axes, [(row[key] * unit, row["kl_mean"], row["group"]) for row in heads])
    return figure


def _replica_and_controls(axes: Axes, rows: Sequence[Row], key: str, unit: float, colour: str) -> None:
    head, *controls = rows
    x, y = head[key] * unit, head["kl_mean"]
    for row in controls:
        axes.plot([x, row[key] * unit], [y, row["kl_mean"]], color=colour, lw=0.9, alpha=0.7)
        axes.plot(row[key] * unit, row["kl_mean"], "x", color=colour, ms=6)
    if head["kl_ci"]:
        axes.vlines(x, *head["kl_ci"], color=colour, lw=1.3)
    face = colour if head["role"] == "replica" else "none"
    axes.plot(x, y, "o", color=colour if controls else INK, markerfacecolor=face, ms=6)


@mpl.rc_context(STYLE)
def experiment_figure(rows: Sequence[Row]) -> Figure:
    """Draw accept rates with their intervals, and the ranges that were expected."""
    entries = 2 + max(len(row["detection"]) for row in rows)  # of the legend
    figure, axes = panel(7.5, 0.7 + max(0.5 * len(rows), 0.2 * entries))

    def named(row_index: int, name: str) -> str | None:
        return printable(name) if row_index == 0 else None  # one entry of the legend for all rows

    for row_index, row in enumerate(rows):
        low, high = row["expected"]
        label = named(row_index, "expected")
        axes.barh(row_index, high - low, left=low, height=0.7, color=COLOURS[6], alpha=0.5, label=label)
        rate = row["avg_accept_rate"]
        axes.plot(row["accept_rate_ci"] or (rate, rate), (row_index, row_index), color=INK, lw=1.5)
        axes.plot(rate, row_index, "o", color=INK, label=named(row_index, "measured"))
        for index, (name, prover) in enumerate(row["detection"].items(), 1):
            colour, marker = style(index)
            label = named(row_index, f"prover {name}")
            axes.plot(prover["avg_accept_rate"], row_index, marker, color=colour, ms=5, label=label)
    names = [printable(f"{row['study']}: {row['prover']} → {row['verifier']}") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("cells accepted")
    legend_outside(axes)
    return figure


# A statistic of cells, and the threshold that limits it.
LIMITS = {"Pe": "Pe", "Pm": "Pm", "Pw": "Pw", "mean_error": "mean_epsilon", "accept_rate": "accept_rate_min"}


@mpl.rc_context(STYLE)
def distribution_figure(row: Row) -> Figure:
    """Draw histograms of each statistic, honest runs and attacks, with the threshold."""
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    grid = figure.subplots(2, 3).ravel()
    for axes, (statistic, limit) in zip(grid, LIMITS.items(), strict=False):
        for index, (name, statistics) in enumerate(row["distributions"].items()):
            values = statistics[statistic]
            if values["n"]:
                shares = np.array(values["histogram"]["counts"]) / values["n"]
                filled = np.flatnonzero(shares)  # the others may lie where no value can
                low, high = filled[0], filled[-1] + 1
                edges = values["histogram"]["edges"][low : high + 1]
                axes.stairs(shares[low:high], edges, color=style(index)[0], label=printable(name))
        axes.axvline(row["thresholds"][limit], color=INK, ls="--", lw=1)
        axes.set_xlabel(statistic.replace("_", " "))
        axes.set_yticks([])
    handles, labels = grid[0].get_legend_handles_labels()
    grid[-1].axis("off")
    grid[-1].legend(handles, labels, frameon=False, title="prover", loc="center")
    return figure


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
    figure, axes = panel(7.5, 4)
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
    figure, axes = panel(7.5, 0.8 + 0.3 * len(names) * len(known))
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


@mpl.rc_context(STYLE)
def audit_figure(run: Run) -> Figure | None:
    """Draw the audited answers in their order beside the band that honest answers span; None without
    answers."""
    rows = [row for row in run["rows"] if row["score"] is not None]
    if not rows:
        return None
    figure, axes = panel(8, 3.4)
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
    figure, axes = panel(8, 2.8)
    p_values = [max(row["p_value"], 1e-30) for row in run["rows"]]
    audits = [row["audit"] for row in run["rows"]]
    axes.step(audits, p_values, "o-", where="post", color=COLOURS[1], ms=4, label="all requests")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(run["decision"]["alpha"], color=INK, lw=0.8, ls="--", label="alpha")
    axes.set(xlabel="audit", ylabel="p-value", yscale="log")
    legend_outside(axes)
    return figure

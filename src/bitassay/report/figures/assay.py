"""The plots of an assay: quality against size, distance of hidden states by layer, speed."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from bitassay.report.figures.drawing import (
    INK,
    LETTER_WIDTH,
    STYLE,
    Labels,
    label_points,
    panel,
    short_name,
    style,
)
from bitassay.report.tables import Row, Run


@mpl.rc_context(STYLE)
def quality_figure(run: Run) -> Figure | None:
    """Draw KL divergence and change of perplexity against the size of the checkpoint, with 95 % intervals;
    None where only the base model was measured."""
    if len(run["rows"]) < 2:
        return None
    return _side_by_side(9, (draw_divergence, run["rows"]), (draw_perplexity, run["rows"]))


@mpl.rc_context(STYLE)
def layers_figure(run: Run) -> Figure | None:
    """Draw the relative distance of hidden states by layer; None where nothing was verified."""
    if not _verified(run):
        return None
    figure, axes = panel(9, 3.9)
    label_points(axes, draw_layers(axes, run))
    return figure


@mpl.rc_context(STYLE)
def speed_figure(run: Run) -> Figure | None:
    """Draw decode and prefill speed beside the base model's; None where nothing was timed."""
    timed = [
        (index, row)
        for index, row in enumerate(run["rows"])
        if row.get("prefill_tok_s") and row.get("decode_tok_s")
    ]
    if len(timed) < 2:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.38 * len(timed)), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        draw_speed(axes, timed, f"{phase}_tok_s")
        axes.set_xlabel(f"{phase}, tokens/s")
    return figure


@mpl.rc_context(STYLE)
def summary_figure(run: Run) -> Figure:
    """Draw quality against size beside distance by layer: the picture of a README."""
    right = (draw_layers, run) if _verified(run) else (draw_perplexity, run["rows"])
    return _side_by_side(10, (draw_divergence, run["rows"]), right)


def _side_by_side(width: float, *panels: tuple[Any, Any]) -> Figure:
    """Panels with their names, which are placed once both are drawn."""
    figure = Figure(figsize=(width, 3.9), layout="constrained")
    grid = figure.subplots(1, len(panels))
    labels = [draw(axes, data) for axes, (draw, data) in zip(grid, panels, strict=True)]
    for axes, names in zip(grid, labels, strict=True):
        label_points(axes, names)
    return figure


def draw_divergence(axes: Axes, rows: Sequence[Row]) -> Labels:
    """Draw KL divergence on a log axis; models without any are named in a corner, since it has no zero."""
    labels = []
    # The interval of a tiny divergence may reach zero: it then ends a decade below the smallest value.
    floor = min((row["kl_mean"] for row in rows if row["kl_mean"] > 0), default=1.0) / 10
    for index, row in enumerate(rows):
        if row["kl_mean"] > 0:
            low, high = row.get("kl_ci") or (row["kl_mean"], row["kl_mean"])
            labels.append(_point(axes, index, row, row["kl_mean"], (max(low, floor), high)))
    if zero := [row["recipe"] for row in rows[1:] if row["kl_mean"] <= 0]:
        text = f"exactly 0: {short_name(', '.join(zero))}"
        axes.annotate(text, (0.02, 0.02), xycoords="axes fraction", fontsize="small")
    axes.set_yscale("log")
    axes.set(xlabel="checkpoint, MB", ylabel="KL divergence to the base, nats a token")
    return labels


def draw_perplexity(axes: Axes, rows: Sequence[Row]) -> Labels:
    """Draw the change of perplexity, on an axis that is linear around zero and logarithmic beyond."""
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    labels = [
        _point(axes, index, row, row["ppl_delta"], row.get("ppl_delta_ci"))
        for index, row in enumerate(rows[1:], 1)
    ]
    reach = [max(map(abs, row.get("ppl_delta_ci") or (row["ppl_delta"],))) for row in rows[1:]]
    linear = 10.0 ** math.floor(math.log10(min((value for value in reach if value > 0), default=1.0)))
    axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.set(xlabel="checkpoint, MB", ylabel="perplexity minus the base's")
    return labels


def draw_layers(axes: Axes, run: Run) -> Labels:
    """Draw a line for each model; the band is what honest runs of the base model spanned."""
    layers, labels = run["verification"]["layers"], []
    distances = [d for row in run["rows"] for d in row.get("hidden_distance_by_layer") or () if d > 0]
    floor = min(distances, default=1.0) / 10
    for index, row in enumerate(run["rows"]):
        if row.get("hidden_distance_by_layer") is None:
            continue
        colour, marker = style(index)
        if index == 0 and (spans := row.get("hidden_distance_range_by_layer")):
            _draw_band(axes, layers, [(max(low, floor), high) for low, high in spans])
        values = [max(value, floor) for value in row["hidden_distance_by_layer"]]
        axes.plot(layers, values, color=colour, marker=marker)
        labels.append((layers[-1], values[-1], "honest" if index == 0 else row["recipe"]))
    axes.set_yscale("log")
    axes.set(xlabel="after decoder layer", ylabel="relative distance of hidden states", xticks=layers)
    longest = max((len(short_name(name)) for _, _, name in labels), default=0)
    room = (32 + LETTER_WIDTH * longest) / axes.get_window_extent().width  # for the names
    width = max(layers) - min(layers) or 1
    axes.set_xlim(min(layers) - 0.06 * width, max(layers) + width * room / (1 - room))
    return labels


def _draw_band(axes: Axes, layers: Sequence[float], spans: Sequence[tuple[float, float]]) -> None:
    low, high = zip(*spans, strict=True)
    if len(layers) == 1:  # an area needs some width
        layers, low, high = (layers[0] - 0.04, layers[0] + 0.04), low * 2, high * 2
    axes.fill_between(layers, low, high, color="#808080", alpha=0.3, linewidth=0)


def draw_speed(axes: Axes, timed: Sequence[tuple[int, Row]], key: str) -> None:
    """Draw a bar for each model, with its speed and the ratio to the first."""
    values = [row[key] for _, row in timed]
    bars = axes.barh(range(len(timed)), values, height=0.65, color=[style(index)[0] for index, _ in timed])
    texts = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values]
    ratios = ["", *(f"  ({value / values[0]:.2g}×)" for value in values[1:])]
    axes.bar_label(bars, [text + ratio for text, ratio in zip(texts, ratios, strict=True)], padding=4)
    axes.set_yticks(range(len(timed)), [short_name(row["recipe"]) for _, row in timed])
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(0, max(values) * 1.4)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()


def _verified(run: Run) -> bool:
    layers = (run["verification"] or {}).get("layers")
    return bool(layers) and any(row.get("hidden_distance_by_layer") for row in run["rows"])


def _point(
    axes: Axes, index: int, row: Row, value: float, interval: Sequence[float] | None
) -> tuple[float, float, str]:
    colour, marker = style(index)
    low, high = interval or (value, value)
    x = row["size_bytes"] / 1e6
    errors = [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(x, value, yerr=errors, color=colour, marker=marker, markersize=6, capsize=3)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=6)
    return x, value, row["recipe"]

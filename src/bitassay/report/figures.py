"""The plots of an assay, as matplotlib figures: quality against size, distance by layer, speed.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every series has a marker of its own as well.
"""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitassay.report.schema import AssayRun, Row

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*<>ph"
KL_FLOOR = 1e-5


def svg(figure: Figure) -> str:
    """The figure as an SVG element for a page; equal figures give equal text."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bitassay", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def quality_figure(run: AssayRun) -> Figure:
    """KL divergence and perplexity against the size of the checkpoint, with 95 % intervals."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw_divergence(figure.add_subplot(1, 2, 1), run.rows)
    draw_perplexity(figure.add_subplot(1, 2, 2), run.rows)
    return figure


def layers_figure(run: AssayRun) -> Figure | None:
    """Relative distance of hidden states by layer; None where nothing was verified."""
    if not _verified(run.rows):
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw_layers(figure.add_subplot(), run)
    return figure


def speed_figure(run: AssayRun) -> Figure | None:
    """Decode and prefill speed relative to the base model; None where nothing was timed."""
    rows = [row for row in run.rows if row.prefill_tok_s and row.decode_tok_s]
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(rows)), layout="constrained")
    for place, (key, title) in enumerate((("decode_tok_s", "decode, tokens/s"), ("prefill_tok_s", "prefill, tokens/s"))):
        axes = figure.add_subplot(1, 2, place + 1)
        values = [getattr(row, key) for row in rows]
        bars = axes.barh([row.recipe for row in rows], values, color=[_style(i)[0] for i in range(len(rows))])
        axes.bar_label(bars, [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in values], padding=3)
        axes.set(xlabel=title, xlim=(0, max(values) * 1.2))
        axes.invert_yaxis()
        _clean(axes)
    return figure


def summary_figure(run: AssayRun) -> Figure:
    """Quality against size beside distance by layer: the picture of a README."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    draw_divergence(figure.add_subplot(1, 2, 1), run.rows)
    axes = figure.add_subplot(1, 2, 2)
    if _verified(run.rows):
        draw_layers(axes, run)
    else:
        draw_perplexity(axes, run.rows)
    return figure


def draw_divergence(axes: Axes, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        if row.kl_mean > 0:
            _point(axes, index, row, max(row.kl_mean, KL_FLOOR), row.kl_ci)
    axes.locator_params(axis="x", nbins=6)
    axes.set(yscale="log", xlabel="checkpoint, MB", ylabel="KL divergence to the base, nats a token")
    _clean(axes)


def draw_perplexity(axes: Axes, rows: Sequence[Row]) -> None:
    base = rows[0].ppl
    axes.axhline(base, color="#777777", linewidth=1, linestyle="--")
    for index, row in enumerate(rows):
        _point(axes, index, row, row.ppl, row.ppl_ci)
    axes.locator_params(axis="x", nbins=6)
    axes.set(yscale="log", xlabel="checkpoint, MB", ylabel="perplexity")
    _clean(axes)


def draw_layers(axes: Axes, run: AssayRun) -> None:
    """A line for each recipe; the band is what honest runs of the base model spanned."""
    layers = list((run.verification or {}).get("layers") or [])
    for index, row in enumerate(run.rows):
        if not row.hidden_distance_by_layer or len(row.hidden_distance_by_layer) != len(layers):
            continue
        colour, marker = _style(index)
        if index == 0 and row.hidden_distance_range_by_layer:
            low, high = zip(*row.hidden_distance_range_by_layer, strict=True)
            axes.fill_between(layers, low, high, color="#999999", alpha=0.35, label="honest, all traces")
        label = "base (honest)" if index == 0 else row.recipe
        axes.plot(layers, row.hidden_distance_by_layer, color=colour, marker=marker, label=label)
    axes.set(yscale="log", xlabel="after decoder layer", ylabel="relative distance of hidden states", xticks=layers)
    axes.legend(fontsize="small", ncols=2, frameon=False)
    _clean(axes)


def _verified(rows: Sequence[Row]) -> bool:
    return any(row.hidden_distance_by_layer for row in rows)


def _style(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _point(axes: Axes, index: int, row: Row, value: float, interval: tuple[float, float] | None) -> None:
    colour, marker = _style(index)
    low, high = interval or (value, value)
    errors = [[max(value - max(low, KL_FLOOR), 0)], [max(high - value, 0)]]
    x = row.size_bytes / 1e6
    axes.errorbar(x, value, yerr=errors, color=colour, marker=marker, markersize=6, capsize=3)
    axes.annotate(row.recipe.replace("$", r"\$"), (x, value), textcoords="offset points", xytext=(7, 4), fontsize="small")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0.15)

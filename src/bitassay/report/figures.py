"""The plots of an assay, as matplotlib figures: quality against size, distance by layer, speed; and how the
figures of every page are drawn (`svg`, `svg_file`, `write_png`).

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every series has a marker and a label
of its own as well. On a page, colours become CSS variables, so that one drawing serves light and dark.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    SymmetricalLogLocator,
)

from bitassay.record.files import atomic_file
from bitassay.report.schema import AssayRun, Row
from bitassay.report.tables import printable

INK = "#1b1b1a"
COLOURS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*<>ph"
LABEL_LETTERS = 20
LABEL_HEIGHT = 15  # pixels, at the 100 an inch of an unsaved figure
LETTER_WIDTH = 7
POINTS = 0.72  # in such a pixel

# Where a name belongs, in the units of the axes: x, y, name.
Labels = list[tuple[float, float, str]]

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "font.family": "sans-serif",
    "text.parse_math": False,  # names come from anyone
    "svg.fonttype": "none",
    "svg.hashsalt": "bitassay",
}


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element for a page; equal figures give equal text. `prefix` keeps the ids of
    several figures in one page apart."""
    text = _drawn(figure, facecolor="none")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(
        r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", text
    )
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--series-{index})")
    return text


def svg_file(figure: Figure) -> str:
    """The figure as an SVG file of its own, on white."""
    return _drawn(figure, facecolor="white")


def write_png(figure: Figure, path: Path, dpi: int) -> None:
    """The figure as a PNG file, on white."""
    plain_ticks(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")


def plain_ticks(figure: Figure) -> None:
    """Label logarithmic axes with plain numbers, also between the powers of ten where they span few of them.

    matplotlib writes such labels as formulas, which STYLE leaves as they are, since names may hold a `$`.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
            if isinstance(axis.get_minor_formatter(), LogFormatter):
                axis.set_minor_formatter(NullFormatter())
            if axis.get_scale() == "log" and isinstance(axis.get_major_locator(), LogLocator | MaxNLocator):
                axis.set_major_locator(_log_locator(axis))


def _log_locator(axis: Axis) -> LogLocator | MaxNLocator:
    low, high = axis.get_view_interval()
    if high / low < 5:
        return MaxNLocator(4, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,))


def plain_number(value: float) -> str:
    """A tick's label: 0.001, 0.5, 20, 1,000,000; far from 1 as 1e+09."""
    return f"{value:,.7g}" if abs(value) < 1e7 else f"{value:.4g}"


def _drawn(figure: Figure, facecolor: str) -> str:
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    plain_ticks(figure)
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=nothing, facecolor=facecolor)
    text = out.getvalue()
    return text[text.index("<svg") :]


def quality_figure(run: AssayRun) -> Figure | None:
    """KL divergence and change of perplexity against the size of the checkpoint, with 95 % intervals; None
    where only the base model was measured."""
    if len(run.rows) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        divergence, perplexity = draw_divergence(left, run.rows), draw_perplexity(right, run.rows)
        label_points(left, divergence)
        label_points(right, perplexity)
    return figure


def layers_figure(run: AssayRun) -> Figure | None:
    """Relative distance of hidden states by layer; None where nothing was verified."""
    if not _verified(run):
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        axes = figure.subplots()
        label_points(axes, draw_layers(axes, run))
    return figure


def speed_figure(run: AssayRun) -> Figure | None:
    """Decode and prefill speed beside the base model's; None where nothing was timed."""
    timed = [(index, row) for index, row in enumerate(run.rows) if row.prefill_tok_s and row.decode_tok_s]
    if len(timed) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.38 * len(timed)), layout="constrained")
        for axes, key, title in zip(
            figure.subplots(1, 2),
            ("decode_tok_s", "prefill_tok_s"),
            ("decode, tokens/s", "prefill, tokens/s"),
            strict=True,
        ):
            draw_speed(axes, timed, key)
            axes.set_xlabel(title)
    return figure


def summary_figure(run: AssayRun) -> Figure:
    """Quality against size beside distance by layer: the picture of a README."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        divergence = draw_divergence(left, run.rows)
        other = draw_layers(right, run) if _verified(run) else draw_perplexity(right, run.rows)
        label_points(left, divergence)
        label_points(right, other)
    return figure


def draw_divergence(axes: Axes, rows: Sequence[Row]) -> Labels:
    """KL divergence on a log axis; models without any are named in a corner, since the axis has no zero."""
    labels = []
    # The interval of a tiny divergence may reach zero: it then ends a decade below the smallest value.
    floor = min((row.kl_mean for row in rows if row.kl_mean > 0), default=1.0) / 10
    for index, row in enumerate(rows):
        if row.kl_mean > 0:
            low, high = row.kl_ci or (row.kl_mean, row.kl_mean)
            labels.append(_point(axes, index, row, row.kl_mean, (max(low, floor), high)))
    if zero := [row.recipe for row in rows[1:] if row.kl_mean <= 0]:
        text = f"exactly 0: {_short(', '.join(zero))}"
        axes.annotate(text, (0.02, 0.02), xycoords="axes fraction", fontsize="small")
    axes.set_yscale("log")
    axes.set(xlabel="checkpoint, MB", ylabel="KL divergence to the base, nats a token")
    return labels


def draw_perplexity(axes: Axes, rows: Sequence[Row]) -> Labels:
    """Change of perplexity, on an axis that is linear around zero and logarithmic beyond."""
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    labels = []
    for index, row in enumerate(rows[1:], 1):
        labels.append(_point(axes, index, row, row.ppl_delta, row.ppl_delta_ci))
    reach = [max(map(abs, row.ppl_delta_ci or (row.ppl_delta,))) for row in rows[1:]]
    linear = 10.0 ** math.floor(math.log10(min((value for value in reach if value > 0), default=1.0)))
    axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.set(xlabel="checkpoint, MB", ylabel="perplexity minus the base's")
    return labels


def draw_layers(axes: Axes, run: AssayRun) -> Labels:
    """A line for each model; the band is what honest runs of the base model spanned."""
    assert run.verification is not None
    layers, labels = run.verification.layers, []
    distances = [d for row in run.rows for d in row.hidden_distance_by_layer or () if d > 0]
    floor = min(distances, default=1.0) / 10
    for index, row in enumerate(run.rows):
        if row.hidden_distance_by_layer is None:
            continue
        colour, marker = _style(index)
        if index == 0 and row.hidden_distance_range_by_layer:
            _draw_band(axes, layers, [(max(a, floor), b) for a, b in row.hidden_distance_range_by_layer])
        values = [max(value, floor) for value in row.hidden_distance_by_layer]
        axes.plot(layers, values, color=colour, marker=marker)
        labels.append((layers[-1], values[-1], "honest" if index == 0 else row.recipe))
    axes.set_yscale("log")
    axes.set(xlabel="after decoder layer", ylabel="relative distance of hidden states", xticks=layers)
    longest = max((len(_short(name)) for _, _, name in labels), default=0)
    room = (32 + LETTER_WIDTH * longest) / axes.get_window_extent().width  # for the names
    width = max(layers) - min(layers) or 1
    axes.set_xlim(min(layers) - 0.06 * width, max(layers) + width * room / (1 - room))
    return labels


def _draw_band(axes: Axes, layers: Sequence[float], spans: Sequence[tuple[float, float]]) -> None:
    low, high = zip(*spans, strict=True)
    if len(layers) == 1:  # an area needs some width
        layers, low, high = (layers[0] - 0.04, layers[0] + 0.04), low * 2, high * 2
    axes.fill_between(layers, low, high, color="#808080", alpha=0.3, linewidth=0)


def draw_speed(
    axes: Axes, timed: Sequence[tuple[int, Row]], key: Literal["decode_tok_s", "prefill_tok_s"]
) -> None:
    """A bar for each model, with its speed and the ratio to the first."""
    values = [getattr(row, key) for _, row in timed]
    bars = axes.barh(range(len(timed)), values, height=0.65, color=[_style(index)[0] for index, _ in timed])
    texts = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values]
    ratios = ["", *(f"  ({value / values[0]:.2g}×)" for value in values[1:])]
    axes.bar_label(bars, [text + ratio for text, ratio in zip(texts, ratios, strict=True)], padding=4)
    axes.set_yticks(range(len(timed)), [_short(row.recipe) for _, row in timed])
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(0, max(values) * 1.4)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()


def label_points(axes: Axes, labels: Labels) -> None:
    """Write each name beside its point, moved up where it would cover another, with a line to its point."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    plain_ticks(figure)
    figure.draw_without_rendering()  # only now is it known where on the drawing a point lies
    box, taken = axes.get_window_extent(), list[tuple[float, float, float]]()
    for x, y, name in sorted(labels, key=lambda label: label[1]):
        at, height = axes.transData.transform((x, y))
        text = _short(name)
        leftwards = at + 8 + LETTER_WIDTH * len(text) > box.x1
        start = at - 8 - LETTER_WIDTH * len(text) if leftwards else at + 8
        end, wanted = start + LETTER_WIDTH * len(text), height
        for left, right, other in sorted(taken, key=lambda place: place[2]):
            if left < end and start < right and abs(other - wanted) < LABEL_HEIGHT:
                wanted = other + LABEL_HEIGHT
        taken.append((start, end, wanted))
        moved = wanted - height > LABEL_HEIGHT / 2
        aside = 20 if moved else 8
        axes.annotate(
            text,
            (x, y),
            xytext=((-aside if leftwards else aside) * POINTS, (wanted - height) * POINTS),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="center",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.5, "linewidth": 0.6} if moved else None,
        ).set_in_layout(False)


def _verified(run: AssayRun) -> bool:
    return run.verification is not None and any(row.hidden_distance_by_layer for row in run.rows)


def _style(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1] + "…"


def _point(
    axes: Axes, index: int, row: Row, value: float, interval: tuple[float, float] | None
) -> tuple[float, float, str]:
    colour, marker = _style(index)
    low, high = interval or (value, value)
    x = row.size_bytes / 1e6
    errors = [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(x, value, yerr=errors, color=colour, marker=marker, markersize=6, capsize=3)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=6)
    return x, value, row.recipe

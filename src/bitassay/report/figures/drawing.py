"""How the plots of all pages are drawn: style, colours, ticks, names beside points, SVG and PNG.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every series has a marker and a label
of its own as well. On a page, colours become CSS variables, so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullFormatter

from bitassay.record.files import atomic_file
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


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a new figure of so many inches with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure, prefix: str) -> str:
    """Return the figure as an SVG element for a page; equal figures give equal text. `prefix` keeps the ids
    of several figures in one page apart."""
    out = io.StringIO()
    plain_ticks(figure)
    with mpl.rc_context(STYLE):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=no_metadata, facecolor="none")
    text = out.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(
        r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", text
    )
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--series-{index})")
    return text


def write_png(figure: Figure, path: Path, dpi: int = 140) -> None:
    """Write the figure as a PNG file, on white."""
    plain_ticks(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")


def plain_ticks(figure: Figure) -> None:
    """Label logarithmic axes with plain numbers, also between the powers of ten where they span few of them.

    matplotlib writes such labels as formulas, which STYLE leaves as they are, since names may hold a `$`.
    """
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
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
    """Return a tick's label: 0.001, 0.5, 20, 1,000,000; far from 1 as 1e+09."""
    return f"{value:,.7g}" if abs(value) < 1e7 else f"{value:.4g}"


def style(index: int) -> tuple[str, str]:
    """Return colour and marker of a series."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def short_name(name: str) -> str:
    """Return a name as it is drawn: one line of at most LABEL_LETTERS."""
    name = printable(name)
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1] + "…"


def legend_outside(axes: Axes) -> None:
    """Put the legend to the right of the axes."""
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def names_of(rows: Iterable[Any], key: str) -> list[str]:
    """Return the different values under `key`, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def label_points(axes: Axes, labels: Labels) -> None:
    """Write each name beside its point, moved up where it would cover another, with a line to its point."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    plain_ticks(figure)
    figure.draw_without_rendering()  # only now is it known where on the drawing a point lies
    box, taken = axes.get_window_extent(), list[tuple[float, float, float]]()
    for x, y, name in sorted(labels, key=lambda label: label[1]):
        at, height = axes.transData.transform((x, y))
        text = short_name(name)
        leftwards = at + 8 + LETTER_WIDTH * len(text) > box.x1
        start = at - 8 - LETTER_WIDTH * len(text) if leftwards else at + 8
        end, wanted = start + LETTER_WIDTH * len(text), height
        for left, right, other in sorted(taken, key=lambda label: label[2]):
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

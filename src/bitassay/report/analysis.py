"""An analysis for people: a table of layers, heat maps of layers by matrices as PNG, and one HTML file that
opens offline."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bitassay.report.figures import STYLE, write_png
from bitassay.report.page import write_page
from bitassay.report.tables import Column, percent, printable, significant

_few = significant(3)

LAYER_COLUMNS = [
    Column("layer", "layer"),
    Column("kl", "KL, only this\nlayer quantized", _few, also=("kl_se",)),
    Column("kl_predicted", "KL\npredicted", _few),
    Column("hidden_variance", "hidden\nvariance", _few),
    Column("hidden_kurtosis", "hidden\nkurtosis", _few),
    Column("hidden_outlier_columns", "outlier\ncolumns"),
    Column("hidden_beyond_3_sigma", "beyond\n3 sigma", percent(2)),
    Column("hidden_beyond_100_medians", "beyond 100\nmedians"),
    Column("hidden_largest_in_medians", "largest,\nin medians", _few),
]

MATRIX_COLUMNS = [
    Column("name", "matrix", align="left"),
    Column("bits", "bits/\nweight", significant(4)),
    Column("tokens", "tokens"),
    Column("weight_error", "weight\nerror", _few),
    Column("output_error", "output\nerror", _few),
    Column("kl_predicted", "KL\npredicted", _few),
    Column("kl", "KL\nmeasured", _few),
    *(
        Column(f"{of}_{key}", f"{of}\n{title}", form)
        for of in ("weight", "input")
        for key, title, form in (
            ("mean", "mean", _few),
            ("variance", "variance", _few),
            ("kurtosis", "kurtosis", _few),
            ("outlier_columns", "outlier columns", str),
            ("beyond_3_sigma", "beyond 3 sigma", percent(2)),
            ("beyond_100_medians", "beyond 100 medians", str),
            ("largest_in_medians", "largest in medians", _few),
        )
    ),
]

ROUTING_COLUMNS = [
    Column("module", "experts", align="left"),
    Column("tokens", "tokens"),
    Column("experts_per_token", "experts\na token"),
    Column("fewest_tokens", "fewest tokens\nof an expert"),
    Column("largest_share", "largest\nshare", percent(1)),
    Column("changed_fraction", "tokens whose\nexperts changed", percent(1)),
]


@dataclass(frozen=True)
class Measure:
    """A heat map. `total`: slices of one fused parameter add up; otherwise their mean is shown."""

    key: str
    title: str
    about: str
    total: bool = False


MEASURES = (
    Measure("kl", "KL measured", "nats a token, when only this matrix is quantized"),
    Measure("kl_predicted", "KL predicted", "nats a token, from the output error", total=True),
    Measure("output_error", "Output error", "relative to the matrix's output"),
    Measure("weight_error", "Weight error", "relative to the matrix"),
    Measure("weight_kurtosis", "Kurtosis of weights", "3 for a Gaussian"),
    Measure("input_kurtosis", "Kurtosis of inputs", "3 for a Gaussian"),
    Measure("input_largest_in_medians", "Largest input", "in medians of its window: massive beyond 100"),
)
PICTURED = ("kl", "kl_predicted", "output_error", "weight_kurtosis", "input_largest_in_medians")


@dataclass(frozen=True)
class HeatMap:
    """A measure of every matrix: values by layer and kind, NaN where there is none."""

    measure: Measure
    kinds: list[str]
    values: Float[np.ndarray, "layers kinds"]

    def shade(self, value: float) -> float:
        """0 to 1 along the logarithm of the values; 0 where there is none."""
        positive = self.values[self.values > 0]
        if not value > 0:
            return 0.0
        low, high = math.log(positive.min()), math.log(positive.max())
        return (math.log(value) - low) / (high - low) if high > low else 1.0


def heat_maps(run: dict[str, Any]) -> list[HeatMap]:
    """Those of the measures that were taken."""
    kinds = list(dict.fromkeys(row["kind"] for row in run["matrices"]))
    found = []
    for measure in MEASURES:
        cells: dict[tuple[int, int], list[float]] = {}
        for row in run["matrices"]:
            if (value := row.get(measure.key)) is not None:
                cells.setdefault((row["layer"], kinds.index(row["kind"])), []).append(value)
        values = np.full((len(run["layers"]), len(kinds)), np.nan)
        for cell, parts in cells.items():
            values[cell] = sum(parts) / (1 if measure.total else len(parts))
        if cells:
            found.append(HeatMap(measure, kinds, values))
    return found


def heat_map_figure(run: dict[str, Any]) -> Figure:
    """Layers down, matrices across; one panel for each of the measures PICTURED."""
    maps = [found for found in heat_maps(run) if found.measure.key in PICTURED]
    layers, kinds = maps[0].values.shape
    size = (len(maps) * max(2.6, 0.42 * kinds + 1), max(3.2, 0.2 * layers + 2))
    with mpl.rc_context(STYLE), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(printable(f"{run['model']['name']} quantized by {run['recipe']['name']}, by matrix"))
        panels = np.atleast_1d(figure.subplots(1, len(maps), sharey=True))
        for axes, found in zip(panels, maps, strict=True):
            draw_heat_map(axes, found)
        panels[0].set_ylabel("decoder layer")
        panels[0].invert_yaxis()
    return figure


def draw_heat_map(axes: Axes, found: HeatMap) -> None:
    """One panel, on a logarithmic scale of colours that colour-blind readers can tell apart."""
    shown = np.ma.masked_where(~(found.values > 0), found.values)
    if shown.count():
        low, high = float(shown.min()), float(shown.max())
        norm = LogNorm(low, high if high > low else low * 10)
        mesh = axes.pcolormesh(shown, cmap="cividis", norm=norm)
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02)
        ticks = [low, (low * high) ** 0.5, high]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
    axes.set_title(f"{found.measure.title}\n{found.measure.about}", fontsize="small")
    names = [printable(kind.partition(".")[2] or kind) for kind in found.kinds]
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90, fontsize="small")
    layers = len(found.values)
    ticks = range(0, layers, max(1, layers // 12))
    axes.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.xaxis.tick_top()


def write_heat_map(run: dict[str, Any], path: Path) -> None:
    """The figure as a PNG."""
    write_png(heat_map_figure(run), path, dpi=140)


def write_analysis_report(run: dict[str, Any], path: Path) -> None:
    """One HTML file that opens offline."""
    tables = {
        "layers": (LAYER_COLUMNS, run["layers"]),
        "routing": (ROUTING_COLUMNS, run["routing"]),
        "matrices": (MATRIX_COLUMNS, worst_matrices(run)),
    }
    texts = {
        name: {
            "titles": [column.title.replace("\n", " ") for column in columns],
            "rows": [[column.text(row) for column in columns] for row in rows],
        }
        for name, (columns, rows) in tables.items()
    }
    write_page(
        path,
        "analysis.html.j2",
        filters={"few": _few},
        run=run,
        maps=heat_maps(run),
        tables=texts,
        shown=len(texts["matrices"]["rows"]),
    )


def worst_matrices(run: dict[str, Any], count: int = 40) -> list[dict[str, Any]]:
    """Those that are predicted to cost the most, first."""
    return sorted(run["matrices"], key=lambda row: -row["kl_predicted"])[:count]

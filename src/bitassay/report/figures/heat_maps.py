"""Heat maps of an analysis: a measure of every matrix, layers down and kinds of matrices across."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bitassay.report.figures.drawing import STYLE, names_of
from bitassay.report.tables import Run, printable

MOST_CELLS = 1_000_000


@dataclass(frozen=True)
class Measure:
    """What a heat map shows. total: slices of one fused parameter add up; otherwise their mean is shown;
    drawn: in the PNG too."""

    key: str
    title: str
    about: str
    total: bool = False
    drawn: bool = True


MEASURES = (
    Measure("kl", "KL measured", "nats a token, when only this matrix is quantized"),
    Measure("kl_predicted", "KL predicted", "nats a token, from the output error", total=True),
    Measure("output_error", "Output error", "relative to the matrix's output"),
    Measure("weight_error", "Weight error", "relative to the matrix", drawn=False),
    Measure("weight_kurtosis", "Kurtosis of weights", "3 for a Gaussian"),
    Measure("input_kurtosis", "Kurtosis of inputs", "3 for a Gaussian", drawn=False),
    Measure("input_largest_in_medians", "Largest input", "in medians of its window: massive beyond 100"),
)


@dataclass(frozen=True)
class HeatMap:
    """A measure of every matrix: values by layer and kind, NaN where there is none."""

    measure: Measure
    kinds: list[str]
    values: Float[np.ndarray, "layers kinds"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer; a kind of matrix that it has not is left out."""
        return [
            {"layer": layer} | {kind: v for kind, v in zip(self.kinds, row, strict=True) if v == v}
            for layer, row in enumerate(self.values.tolist())
        ]

    def shade(self, value: float) -> float:
        """Return 0 to 1 along the logarithm of the values; 0 where there is none."""
        positive = self.values[self.values > 0]
        if not value > 0:
            return 0.0
        low, high = math.log(positive.min()), math.log(positive.max())
        return (math.log(value) - low) / (high - low) if high > low else 1.0


def heat_maps(run: Run) -> list[HeatMap]:
    """Return a map of each of the measures that were taken. Raises ValueError for more cells than a page can
    hold."""
    kinds, layers = names_of(run["matrices"], "kind"), len(run["layers"])
    if len(kinds) * layers > MOST_CELLS:
        raise ValueError(f"{layers} layers by {len(kinds)} kinds of matrices")
    maps = []
    for measure in MEASURES:
        cells: dict[tuple[int, int], list[float]] = {}
        for row in run["matrices"]:
            if not 0 <= row["layer"] < layers:
                raise ValueError(f"{row['name']} is in layer {row['layer']} of {layers}")
            if (value := row.get(measure.key)) is not None:
                cells.setdefault((row["layer"], kinds.index(row["kind"])), []).append(value)
        values = np.full((layers, len(kinds)), np.nan)
        for cell, parts in cells.items():
            values[cell] = sum(parts) / (1 if measure.total else len(parts))
        if cells:
            maps.append(HeatMap(measure, kinds, values))
    return maps


@mpl.rc_context({**STYLE, "axes.grid": False})
def heat_map_figure(run: Run) -> Figure:
    """Draw layers down, matrices across; one panel for each of the measures that are drawn."""
    maps = [heat_map for heat_map in heat_maps(run) if heat_map.measure.drawn]
    layers, kinds = maps[0].values.shape
    size = (len(maps) * max(2.6, 0.42 * kinds + 1), max(3.2, 0.2 * layers + 2))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(printable(f"{run['model']['name']} quantized by {run['recipe']['name']}, by matrix"))
    panels = np.atleast_1d(figure.subplots(1, len(maps), sharey=True))
    for axes, heat_map in zip(panels, maps, strict=True):
        _draw(figure, axes, heat_map)
    panels[0].set_ylabel("decoder layer")
    panels[0].invert_yaxis()
    return figure


def _draw(figure: Figure, axes: Axes, heat_map: HeatMap) -> None:
    """One panel, on a logarithmic scale of colours that colour-blind readers can tell apart."""
    shown = np.ma.masked_where(~(heat_map.values > 0), heat_map.values)
    if shown.count():
        low, high = float(shown.min()), float(shown.max())
        mesh = axes.pcolormesh(shown, cmap="cividis", norm=LogNorm(low, high if high > low else low * 10))
        scale = figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02)
        ticks = [low, (low * high) ** 0.5, high]
        scale.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        for label, side in zip(scale.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)  # clear of the neighbour's
        scale.minorticks_off()
    axes.set_title(f"{heat_map.measure.title}\n{heat_map.measure.about}", fontsize="small")
    names = [printable(kind.partition(".")[2] or kind) for kind in heat_map.kinds]
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90, fontsize="small")
    ticks = range(0, len(heat_map.values), max(1, len(heat_map.values) // 12))
    axes.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.xaxis.tick_top()

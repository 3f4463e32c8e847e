"""The plots of timings: speed by batch and by context, and the roofline."""

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from bitassay.report.figures.drawing import INK, STYLE, label_points, legend_outside, names_of, panel, style
from bitassay.report.tables import Row, Run, printable


def throughput_figure(run: Run) -> Figure | None:
    """Draw decode and prefill against the batch size; None where no batches were timed."""
    panels = {"decode, tokens/s": ("decode_tok_s", 1.0), "prefill, tokens/s": ("prefill_tok_s", 1.0)}
    return _lines(run, "batch", "batch", "sequences at once", panels)


def context_figure(run: Run) -> Figure | None:
    """Draw decode, time to the first token and cache against the length of the context; None where none was
    timed."""
    panels = {
        "decode, tokens/s": ("decode_tok_s", 1.0),
        "first token, s": ("ttft_s", 1.0),
        "KV cache, MB": ("cache_bytes", 1e-6),
    }
    return _lines(run, "context", "prompt_tokens", "tokens of context", panels)


def _timed(run: Run) -> list[Row]:
    return [row for row in run["rows"] if row.get("skipped") is None]


@mpl.rc_context(STYLE)
def _lines(
    run: Run, kind: str, across: str, label: str, panels: Mapping[str, tuple[str, float]]
) -> Figure | None:
    rows = [row for row in _timed(run) if row["kind"] == kind]
    if not rows:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (key, unit)) in zip(grid, panels.items(), strict=True):
        for index, model in enumerate(names_of(run["rows"], "model")):
            points = [(row[across], row[key] * unit) for row in rows if row["model"] == model]
            if points:
                colour, marker = style(index)
                x, y = zip(*points, strict=True)
                axes.plot(x, y, label=printable(model), color=colour, marker=marker, ms=5, lw=1.2)
        axes.set(xlabel=label, ylabel=title, xscale="log", yscale="log")
        ticks = sorted({row[across] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    legend_outside(grid[-1])
    return figure


@mpl.rc_context(STYLE)
def roofline_figure(run: Run) -> Figure | None:
    """Draw every timed phase as GFLOP/s against FLOP a byte, under the limits of the machine."""
    rows = _timed(run)
    if not rows:
        return None
    bandwidth = run["machine"]["bandwidth"] / 1e9
    peaks = {dtype: peak / 1e9 for dtype, peak in run["machine"]["peaks"].items()}
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        seconds = {"decode": row["batch"] / row["decode_tok_s"], "prefill": row["ttft_s"]}
        for phase, taken in seconds.items():
            point = row[f"{phase}_flop_per_byte"], row[f"{phase}_flop"] / taken / 1e9
            points.setdefault((row["model"], phase), []).append(point)
    reached = [x for series in points.values() for x, _ in series]
    low, high = min(reached) / 3, max(reached) * 3
    figure, axes = panel(8, 4.2)
    labels = []
    for dtype, peak in peaks.items():
        knee = peak / bandwidth
        if knee < high:
            axes.plot([max(low, knee), high], [peak, peak], color=INK, lw=1, ls="--")
            labels.append((high, peak, dtype))
    top = min(high, max(peaks.values()) / bandwidth)
    axes.plot([low, top], [low * bandwidth, top * bandwidth], color=INK, lw=1)
    for index, model in enumerate(names_of(run["rows"], "model")):
        colour, marker = style(index)
        for phase, face in (("decode", colour), ("prefill", "none")):
            if series := points.get((model, phase)):
                x, y = zip(*series, strict=True)
                label = f"{printable(model)}, {phase}"
                axes.plot(x, y, marker, color=colour, markerfacecolor=face, ms=5, ls="none", label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
    axes.set_xlim(right=high * (high / low) ** 0.15)  # room for the names of the peaks
    legend_outside(axes)
    label_points(axes, labels)
    return figure

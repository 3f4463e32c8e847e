"""Timings for people: tables, plots, and one HTML file that opens offline."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitassay.report.figures import COLOURS, INK, MARKERS, STYLE, svg
from bitassay.report.page import write_page
from bitassay.report.tables import (
    Column,
    interval_note,
    number,
    percent,
    printable,
    significant,
    size,
    with_interval,
)


def _few(value: float) -> str:
    """Three digits, all of those before the point."""
    return number(0)(value) if value >= 100 else significant(3)(value)


def _ratio(key: str, title: str) -> Column:
    """A ratio with its interval."""
    return with_interval(key, title, number(2))


def _milliseconds(seconds: float) -> str:
    return _few(seconds * 1e3)


BENCH_COLUMNS = [
    Column("model", "model", align="left"),
    Column("batch", "batch"),
    Column("prompt_tokens", "prompt\ntokens"),
    Column("ttft_s", "first token\nms", _milliseconds),
    Column("prefill_tok_s", "prefill\ntok/s", _few),
    Column("prefill_samples_s", "samples/s", _few),
    _ratio("prefill_ratio", "prefill\nover base [95 %]"),
    Column("prefill_share_of_bound", "of\nbound", percent(1)),
    Column("decode_tok_s", "decode\ntok/s", _few),
    _ratio("decode_ratio", "decode\nover base [95 %]"),
    Column("decode_flop_per_byte", "FLOP/\nbyte", _few),
    Column("decode_share_of_bound", "of\nbound", percent(1)),
    Column("decode_spread", "spread", percent(0)),
    Column("cache_bytes", "KV cache", size),
    Column("peak_resident_bytes", "peak\nresident", size),
    Column("peak_device_bytes", "peak\ndevice", size),
    Column("skipped", "skipped", align="left"),
]
MODEL_COLUMNS = [
    Column("model", "model", align="left"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("checkpoint_bytes", "checkpoint", size),
    Column("weight_bytes_per_token", "weights read\na token", size),
    Column("kv_bytes_per_token", "KV cache\na token", size),
    Column("resident_bytes", "resident\nonce loaded", size),
    Column("dtype", "dtype", align="left"),
    Column("product_dtype", "products\nin", align="left"),
]
PAIR_COLUMNS = [
    Column("group", "replica", align="left"),
    Column("role", "over its control", align="left"),
    Column("control", "which is", align="left"),
    Column("batch", "batch"),
    Column("prompt_tokens", "prompt\ntokens"),
    _ratio("prefill_ratio", "prefill\n[95 %]"),
    _ratio("decode_ratio", "decode\n[95 %]"),
]
MATMUL_COLUMNS = [
    Column("shape", "shape", align="left"),
    Column("format", "format", align="left"),
    Column("scales", "one scale a", align="left"),
    Column("rounding_error", "rounding\nerror", significant(4), also=("rounding_error_range",)),
    Column("documented", "documented", significant(4)),
    Column("over_documented", "measured over\ndocumented", number(3)),
    Column("product_error", "product\nerror", significant(3)),
    Column("weights_error", "weights\nonly", significant(3)),
    _ratio("speed_over_float32", "speed over\nfp32 [95 %]"),
    _ratio("speed_over_bfloat16", "speed over\nbf16 [95 %]"),
    Column("spread", "spread", percent(0)),
    Column("path", "path", align="left"),
]


def shown_columns(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Without the columns that no row has a value in, such as device memory on a CPU."""
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def machine_line(run: Mapping[str, Any]) -> str:
    """What the machine could do, and how busy it was."""
    machine = run["machine"]
    peaks = ", ".join(f"{dtype} {peak / 1e9:.3g} GFLOP/s" for dtype, peak in machine["peaks"].items())
    load, cores = machine["load"], run["environment"]["cores"]
    return (
        f"Measured on the spot: reading {machine['bandwidth'] / 1e9:.3g} GB/s; products {peaks}. "
        f"Threads: {run['environment']['threads']} of {cores} cores; load {min(load):g} to {max(load):g}."
    )


def busy(run: Mapping[str, Any]) -> str:
    """A warning where other work kept the machine busy; empty otherwise."""
    load, own = max(run["machine"]["load"]), run["environment"]["threads"]
    if load <= own + 0.5:
        return ""
    ours = "1 thread was" if own == 1 else f"{own} threads were"
    return f"The load reached {load:g} where {ours} ours: compare ratios, not times."


def throughput_figure(run: Mapping[str, Any]) -> Figure | None:
    """Decode and prefill against the batch size; None where no batches were timed."""
    return _lines(
        run,
        "batch",
        "batch",
        "sequences at once",
        {"decode, tokens/s": ("decode_tok_s", 1), "prefill, tokens/s": ("prefill_tok_s", 1)},
    )


def context_figure(run: Mapping[str, Any]) -> Figure | None:
    """Decode, time to the first token and cache against the length of the context; None where none was
    timed."""
    panels = {
        "decode, tokens/s": ("decode_tok_s", 1.0),
        "first token, s": ("ttft_s", 1.0),
        "KV cache, MB": ("cache_bytes", 1e-6),
    }
    return _lines(run, "context", "prompt_tokens", "tokens of context", panels)


def _lines(
    run: Mapping[str, Any], kind: str, across: str, label: str, panels: Mapping[str, tuple[str, float]]
) -> Figure | None:
    rows = [row for row in run["rows"] if row["kind"] == kind and row.get("skipped") is None]
    if not rows:
        return None
    models = list(dict.fromkeys(row["model"] for row in run["rows"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, (key, unit)) in zip(grid, panels.items(), strict=True):
            for index, model in enumerate(models):
                points = [(row[across], row[key] * unit) for row in rows if row["model"] == model]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, label=printable(model), **_style(index))
            axes.set(xlabel=label, ylabel=title)
            _log(axes, sorted({row[across] for row in rows}))
        grid[-1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def roofline_figure(run: Mapping[str, Any]) -> Figure | None:
    """Every timed phase as GFLOP/s against FLOP a byte, under the limits of the machine."""
    rows = [row for row in run["rows"] if row.get("skipped") is None]
    if not rows:
        return None
    bandwidth = run["machine"]["bandwidth"] / 1e9
    peaks = {dtype: peak / 1e9 for dtype, peak in run["machine"]["peaks"].items()}
    models = list(dict.fromkeys(row["model"] for row in run["rows"]))
    points = [
        (
            models.index(row["model"]),
            phase,
            row[f"{phase}_flop_per_byte"],
            row[f"{phase}_flop"] / seconds / 1e9,
        )
        for row in rows
        for phase, seconds in (
            ("prefill", row["ttft_s"]),
            ("decode", row["batch"] / row["decode_tok_s"]),
        )
    ]
    low, high = min(p[2] for p in points) / 3, max(p[2] for p in points) * 3
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for dtype, peak in peaks.items():
            knee = peak / bandwidth
            if knee < high:
                axes.plot([max(low, knee), high], [peak, peak], color=INK, lw=1, ls="--")
                axes.annotate(dtype, (high, peak), ha="right", va="bottom", fontsize="small")
        top = min(high, max(peaks.values()) / bandwidth)
        axes.plot([low, top], [low * bandwidth, top * bandwidth], color=INK, lw=1)
        for index, model in enumerate(models):
            for phase, face in (("decode", COLOURS[index % len(COLOURS)]), ("prefill", "none")):
                mine = [(x, y) for at, which, x, y in points if (at, which) == (index, phase)]
                if mine:
                    x, y = zip(*mine, strict=True)
                    style: dict[str, Any] = _style(index) | {"linestyle": "none", "markerfacecolor": face}
                    axes.plot(x, y, label=f"{printable(model)}, {phase}", **style)
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.2,
    }


def _log(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def write_bench_report(run: Mapping[str, Any], path: Path) -> None:
    """One HTML file of a run of `bench`."""
    drawn: list[tuple[str, Callable[[Mapping[str, Any]], Figure | None], str]] = [
        (
            "Batches",
            throughput_figure,
            f"Prompts of {run['settings']['prompt_tokens']} tokens read at once, then "
            f"{run['settings']['new_tokens']} greedy steps.",
        ),
        ("Contexts", context_figure, "One prompt of each length, then the same steps behind it."),
        (
            "Roofline",
            roofline_figure,
            "Lines: what the machine read and multiplied at its best in this run. Filled: decode; hollow: "
            "prefill. A model that fits into the processor's cache can lie above the slope.",
        ),
    ]
    figures = [
        {"title": title, "svg": Markup(svg(figure, f"b{place}-")), "text": text}
        for place, (title, draw, text) in enumerate(drawn)
        if (figure := draw(run)) is not None
    ]
    lead = [
        f"{run['settings']['repeats']} rounds over all cells, models in turn, each in a process of its own; "
        f"medians, spread is (largest - smallest) / median. Ratios within rounds, {run['interval']}.",
        machine_line(run),
        busy(run),
    ]
    tables = [
        page_table("Timings", BENCH_COLUMNS, run["rows"]),
        page_table("Models", MODEL_COLUMNS, run["models"]),
    ]
    if run["pairs"]:
        tables.insert(1, page_table("Speed of replicas over their controls", PAIR_COLUMNS, run["pairs"]))
    write_tables(path, f"Speed of {run['model']['name']}", lead, figures, tables, run["environment"])


def write_matmul_report(run: Mapping[str, Any], path: Path) -> None:
    """One HTML file of `bench matmul`."""
    lead = [
        "Rounding error: mean |x' - x| / mean |x| of one matrix of that shape. Product error: relative "
        "Frobenius norm, both sides rounded. Documented: what the replicated documents call the error of a "
        "product; it is that of one rounded matrix with one scale.",
        f"Means over {run['settings']['draws']} draws. Speed: ratios within rounds, {run['interval']}.",
    ]
    write_tables(
        path,
        "Quantized matrix products",
        lead,
        [],
        [page_table("Products", MATMUL_COLUMNS, run["rows"])],
        run["environment"],
    )


def page_table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A table as the page wants it, without the columns that are empty."""
    shown = shown_columns(columns, rows)
    cells = [[column.text(row) for column in shown] for row in rows]
    return {
        "title": title,
        "header": [(one_line(column.title), column.align) for column in shown],
        "rows": [[(text, column.align) for text, column in zip(row, shown, strict=True)] for row in cells],
        "note": interval_note(cells),
    }


def one_line(title: str) -> str:
    """A column's title for a page, where a percent sign stays with its number."""
    return title.replace("\n", " ").replace(" %", "\N{NO-BREAK SPACE}%")


def write_tables(
    path: Path,
    title: str,
    lead: Sequence[str],
    figures: Sequence[Mapping[str, Any]],
    tables: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> None:
    """A page of paragraphs, tables and figures, and the machine and versions behind them."""
    write_page(
        path,
        "bench.html.j2",
        filters={},
        title=title,
        lead=[text for text in lead if text],
        figures=figures,
        tables=tables,
        facts={key: str(value) for key, value in environment.items() if value is not None},
    )

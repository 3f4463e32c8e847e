"""The INT8/FP8 studies for people: tables, plots by granularity, and one HTML file that opens offline.

Variants stand in the order of the study, never by their figures: a better place than another's is claimed
only in `supported`, where an interval bears it out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitassay.report.bench import BENCH_COLUMNS, MATMUL_COLUMNS, page_table, write_tables
from bitassay.report.claims import CLAIM_COLUMNS, points
from bitassay.report.figures import COLOURS, INK, STYLE, svg
from bitassay.report.tables import Column, number, percent, significant, size, with_interval

Row = dict[str, Any]
ALPHA = 0.05


def _method_columns(method: str) -> list[Column]:
    return [
        with_interval(f"{method}_acc", f"{method}\n[95 %]", percent(1)),
        with_interval(f"{method}_difference", f"{method}, points\nto base [95 %]", points),
        Column(f"{method}_p_holm", "p\nHolm", significant(2), also=(f"{method}_p_value",)),
    ]


VARIANT_COLUMNS = [
    Column("variant", "variant", align="left"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("ppl", "ppl", number(2), also=("ppl_ci",)),
    with_interval("ppl_delta", "ppl delta\n[95 %]", number(3)),
    with_interval("kl_mean", "KL to base\n[95 %]", significant(2), "kl_ci"),
    Column("top1_agreement", "top-1\nagreement", percent(1), also=("top1_ci",)),
    *_method_columns("direct"),
    *_method_columns("generate"),
    Column("unparsed", "unparsed"),
    Column("refused", "not run here", align="left"),
]
PAIR_COLUMNS = [
    Column("family", "comparison", align="left"),
    Column("second", "this", align="left"),
    Column("first", "less this", align="left"),
    with_interval("ppl", "ppl\n[95 %]", number(3)),
    with_interval("kl", "KL\n[95 %]", significant(2)),
    with_interval("direct_difference", "direct, points\n[95 %]", points),
    Column("direct_p_holm", "p\nHolm", significant(2)),
    with_interval("generate_difference", "generate, points\n[95 %]", points),
    Column("generate_p_holm", "p\nHolm", significant(2)),
    Column("generate_visible_difference", "visible\npoints", lambda value: number(1)(value * 100)),
]


def supported(run: Mapping[str, Any]) -> list[str]:
    """Which comparisons an interval bears out, in words; nothing else is a ranking."""
    found = []
    for row in run["pairs"]:
        second, first = row["second"], row["first"]
        if (pair := row.get("kl_ci")) and not pair[0] <= 0 <= pair[1]:
            found.append(
                f"{second} is {'nearer to' if pair[1] < 0 else 'farther from'} the base than {first} (KL)"
            )
        if (pair := row.get("ppl_ci")) and not pair[0] <= 0 <= pair[1]:
            found.append(f"{second} has a {'lower' if pair[1] < 0 else 'higher'} perplexity than {first}")
        for method in ("direct", "generate"):
            if row[f"{method}_p_holm"] < ALPHA:
                more = "more" if row[f"{method}_difference"] > 0 else "less"
                found.append(f"{second} is {more} accurate than {first} ({method})")
    return found


def granularity_figure(run: Mapping[str, Any]) -> Figure | None:
    """Accuracy and divergence against granularity, with intervals, INT8 beside FP8, fake models; the band is
    the base's. None where there are fewer than two granularities."""
    rows = [row for row in run["rows"] if row["kind"] == "fake" and row["refused"] is None]
    sizes = list(dict.fromkeys(str(row["granularity"]) for row in rows))
    if len(sizes) < 2:
        return None
    panels = {"direct": "direct_acc", "generate": "generate_acc"}
    panels |= (
        {"KL to base, nats": "kl_mean", "perplexity delta": "ppl_delta"}
        if rows[0].get("kl_mean") is not None
        else {}
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2 * (len(panels) // 2)), layout="constrained")
        grid = figure.subplots(len(panels) // 2, 2, squeeze=False).ravel()
        for axes, (title, key) in zip(grid, panels.items(), strict=True):
            _panel(axes, rows, sizes, key)
            axes.set(ylabel=f"MMLU, {title}" if "acc" in key else title)
            axes.set_xticks(range(len(sizes)), sizes)
            if "acc" in key:
                axes.axhspan(
                    *run["rows"][0][f"{key}_ci"],
                    color=INK,
                    alpha=0.08,
                    label=f"{run['rows'][0]['variant']}, 95 %",
                )
        grid[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _panel(axes: Axes, rows: Sequence[Row], sizes: Sequence[str], key: str) -> None:
    for place, format in enumerate(("int8", "fp8")):
        mine = [row for row in rows if row["format"] == format]
        x = [sizes.index(str(row["granularity"])) + 0.16 * (place - 0.5) for row in mine]
        pair = "ppl_delta_ci" if key == "ppl_delta" else "kl_ci" if key == "kl_mean" else f"{key}_ci"
        ends = [row.get(pair) or (row[key], row[key]) for row in mine]
        colour = COLOURS[place + 1]
        axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=colour, lw=1.3)
        axes.plot(x, [row[key] for row in mine], "os"[place], color=colour, ms=5, label=format)


def write_eight_bit_report(run: Mapping[str, Any], path: Path) -> None:
    """One HTML file of a study."""
    figures = []
    if (figure := granularity_figure(run)) is not None:
        text = "Fake models with 95 % intervals. Differences are paired: theirs are in the table of pairs."
        figures.append({"title": "By granularity", "svg": Markup(svg(figure, "g-")), "text": text})
    tables = [
        page_table("What the document claims", CLAIM_COLUMNS, run["claims"]),
        page_table("Variants", VARIANT_COLUMNS, run["rows"]),
    ]
    if run["pairs"]:
        tables.append(page_table("Pairs", PAIR_COLUMNS, run["pairs"]))
    if run["speed"] is not None:
        rows = run["speed"]["rows"]
        tables.append(page_table("Speed of packed models", BENCH_COLUMNS, rows))
    if run["products"] is not None:
        rows = run["products"]["rows"]
        tables.append(page_table("Products", MATMUL_COLUMNS, rows))
    write_tables(
        path, f"{run['study']}: {run['model']['name']}", lead(run), figures, tables, run["environment"]
    )


def lead(run: Mapping[str, Any]) -> list[str]:
    """What was done, and what the intervals support."""
    protocols = run["protocols"]
    text = f"Text: {protocols['text']}. " if protocols["text"] else ""
    visible = [
        row["generate_visible_difference"] for row in run["rows"] if "generate_visible_difference" in row
    ]
    said = supported(run)
    refused = [row for row in run["rows"] if row["refused"]]
    return [
        f"{run['about']}. {text}Questions: {protocols['questions']} ({protocols['questions_source']}). "
        f"Arithmetic in {run['settings']['dtype']}; losses in fp32. Intervals: {run['interval']}.",
        f"Differences of accuracy from the base that these questions would show: {min(visible) * 100:.1f} to "
        f"{max(visible) * 100:.1f} points."
        if visible
        else "",
        "What the intervals support: "
        + ("; ".join(said) + "." if said else "no comparison of two variants."),
        *(f"{row['variant']} was not run: {row['refused']}." for row in refused),
        *uneven(run),
    ]


def uneven(run: Mapping[str, Any]) -> list[str]:
    """A note where groups do not divide the rows of the model's matrices."""
    return [
        f"In groups of {group}, rows of {', '.join(map(str, columns))} end in a shorter group."
        for group, columns in run["uneven_groups"].items()
    ]

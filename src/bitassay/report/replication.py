"""The studies of replication for people: a table with controls below their replicas, plots of divergence
against what a model stores, computes and reads, verdicts, and one HTML file that opens offline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitassay.quantization.replication.controls import KINDS
from bitassay.report.bench import page_table, write_tables
from bitassay.report.claims import CLAIM_COLUMNS
from bitassay.report.figures import COLOURS, INK, STYLE, label_points, svg
from bitassay.report.tables import (
    DECIDED,
    MISSING,
    Column,
    number,
    percent,
    significant,
    size,
    with_interval,
)

Row = dict[str, Any]


def _beats(kind: str) -> Column:
    """Whether a replica does; nothing where it has no such control, or is none."""
    key = f"beats_{kind.replace('-', '_')}"

    def text(row: Row) -> str:
        return DECIDED[row[key]] if kind in row["controls"] else MISSING

    return Column("controls", f"beats\n{kind.replace('-', ' ')}", text, whole_row=True, also=(key,))


ROW_COLUMNS = [
    Column("group", "group", align="left"),
    Column("role", "is", align="left"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("passes", "passes\na layer", number(2)),
    Column("flop_per_token", "FLOP\na token", significant(3)),
    Column("bytes_per_token", "weights read\na token", size),
    Column("ppl", "ppl", significant(4), also=("ppl_ci",)),
    with_interval("ppl_delta", "ppl delta\n[95 %]", significant(3)),
    with_interval("kl_mean", "KL to base\n[95 %]", significant(3), "kl_ci"),
    Column("top1_agreement", "top-1\nagreement", percent(1), also=("top1_ci",)),
    with_interval("decode_ratio", "decode over\nbase [95 %]", number(2)),
    Column("decode_tok_s", "decode\ntok/s", significant(3)),
    Column("peak_bytes", "peak\nmemory", size),
    Column("grade", "grade", align="left"),
    *map(_beats, KINDS),
]
PAIR_COLUMNS = [
    Column("group", "replica", align="left"),
    Column("role", "less its control", align="left"),
    Column("control", "which is", align="left"),
    with_interval("kl", "KL\n[95 %]", significant(3)),
    with_interval("kl_fraction", "KL as a share\n[95 %]", percent(1)),
    with_interval("ppl", "ppl\n[95 %]", significant(3)),
    Column("read_ratio", "the control reads,\nover the replica", number(2)),
    Column("decode_tok_s", "decode\ntok/s", significant(3)),
    Column("control_decode_tok_s", "the control's\ntok/s", significant(3)),
    Column("control", "beats it", lambda row: DECIDED[row["beats"]], whole_row=True, also=("beats",)),
]
DRAFT_COLUMNS = [
    Column("draft_tokens", "tokens of\na draft"),
    Column("texts", "texts"),
    Column("identical", "identical to\nboth planes"),
    with_interval("acceptance", "accepted\n[95 %]", percent(1)),
    with_interval("speed_bound", "speed by\nbytes read", number(2)),
    with_interval("speed", "speed measured,\ndense weights", number(2)),
]
AXES = {
    "bits stored a weight": ("bits_per_weight", 1.0),
    "FLOP a token, millions": ("flop_per_token", 1e-6),
    "weights read a token, MB": ("bytes_per_token", 1e-6),
}


def costs_figure(run: Mapping[str, Any]) -> Figure:
    """Divergence against bits, FLOP and bytes: replicas filled, and a line from each to every control;
    what has no controls hollow."""
    rows = [row for row in run["rows"] if row["kl_mean"] > 0]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2 * len(AXES)), layout="constrained")
        for axes, (label, (key, unit)) in zip(figure.subplots(len(AXES), 1), AXES.items(), strict=True):
            for place, group in enumerate(groups):
                mine = [row for row in rows if row["group"] == group]
                _joined(axes, mine, key, unit, COLOURS[1 + place % (len(COLOURS) - 1)])
            axes.set(xlabel=label, ylabel="KL to the base, nats", yscale="log")
            axes.margins(x=0.15)
            heads = [row for row in rows if row["role"] in ("replica", "plain")]
            label_points(axes, [(row[key] * unit, row["kl_mean"], row["group"]) for row in heads])
    return figure


def _joined(axes: Axes, rows: Sequence[Row], key: str, unit: float, colour: str) -> None:
    head, *others = rows
    x, y = head[key] * unit, head["kl_mean"]
    for row in others:
        axes.plot([x, row[key] * unit], [y, row["kl_mean"]], color=colour, lw=0.9, alpha=0.7)
        axes.plot(row[key] * unit, row["kl_mean"], "x", color=colour, ms=6)
    if head["kl_ci"]:
        axes.vlines(x, *head["kl_ci"], color=colour, lw=1.3)
    face = colour if head["role"] == "replica" else "none"
    axes.plot(x, y, "o", color=colour if others else INK, markerfacecolor=face, ms=6)


def write_replication_report(run: Mapping[str, Any], path: Path) -> None:
    """One HTML file of a study."""
    text = "Filled: replicas, joined to their controls (crosses). Hollow: without copies, or read in part."
    figures = [{"title": "What it costs", "svg": Markup(svg(costs_figure(run), "r-")), "text": text}]
    tables = [
        page_table("What was predicted", CLAIM_COLUMNS, run["claims"]),
        page_table("Replicas and controls", ROW_COLUMNS, run["rows"]),
    ]
    if run["pairs"]:
        tables.append(page_table("Replicas less their controls", PAIR_COLUMNS, run["pairs"]))
    if run["drafts"]:
        tables.append(page_table("Drafts by plane 1", DRAFT_COLUMNS, run["drafts"]))
    title = f"{run['study']}: {run['model']['name']}"
    write_tables(path, title, lead(run), figures, tables, run["environment"])


def lead(run: Mapping[str, Any]) -> list[str]:
    """What was done, and what the intervals decide."""
    decided = {"beats": [], "loses to": []}
    for pair in run["pairs"]:
        if pair["beats"] is not None:
            words = decided["beats" if pair["beats"] else "loses to"]
            words.append(f"{pair['group']} ({pair['role']})")
    open_ = sum(pair["beats"] is None for pair in run["pairs"])
    return [
        f"{run['about']}. Text: {run['protocol']} ({run['corpus_source']}). "
        f"Arithmetic in {run['settings']['dtype']}; losses in fp32. Intervals: {run['interval']}.",
        "KL lower than a control's beyond doubt: " + (", ".join(decided["beats"]) or "no replica") + ".",
        "Higher beyond doubt: " + (", ".join(decided["loses to"]) or "no replica") + ".",
        f"Not decided by these windows: {open_} of {len(run['pairs'])} comparisons." if run["pairs"] else "",
    ]

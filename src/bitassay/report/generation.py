"""Generation quality for people: a table, one HTML file that opens offline with all texts side by side, and
a sheet for ratings."""

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from bitassay.record.files import write_text
from bitassay.report.bench import one_line
from bitassay.report.figures import COLOURS, STYLE, svg
from bitassay.report.page import write_page
from bitassay.report.tables import Column, interval_note, number, percent, printable, with_interval

GENERATION_COLUMNS = [
    Column("recipe", "recipe", align="left"),
    Column("prompts", "prompts"),
    with_interval("prefix_tokens", "equal prefix,\ntokens\n[95 %]", number(1)),
    with_interval("divergence", "first divergence,\nmedian token\n[95 %]", number(0)),
    with_interval("identical_fraction", "identical\ntexts\n[95 %]", percent(0), "identical_ci"),
    with_interval("bleu", "BLEU\n[95 %]", number(1)),
    with_interval("rouge1", "ROUGE-1\n[95 %]", number(3)),
    with_interval("rouge2", "ROUGE-2\n[95 %]", number(3)),
    with_interval("rougeL", "ROUGE-L\n[95 %]", number(3)),
]


def candidates(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run without the base model's, which is only ever equal to itself."""
    return run["rows"][1:]


def divergence_figure(run: dict[str, Any]) -> Figure:
    """For each model, the share of texts that are still the base model's after so many tokens."""
    base = next(iter(run["texts"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        tokens = np.arange(run["settings"]["max_new_tokens"] + 1)
        for index, name in enumerate(name for name in run["texts"] if name != base):
            texts = run["texts"][name]
            prefix = np.array([one["prefix_tokens"] for one in texts])
            whole = [
                one["tokens"] == other["tokens"] == one["prefix_tokens"]
                for one, other in zip(texts, run["texts"][base], strict=True)
            ]
            share = [(np.array(whole) | (prefix >= at)).mean() for at in tokens]
            colour = COLOURS[1:][index % (len(COLOURS) - 1)]
            axes.step(tokens, share, where="post", color=colour, label=printable(name))
        axes.set(xlabel="tokens written", ylabel="texts equal to the base's so far", ylim=(-0.02, 1.02))
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_generation_report(run: dict[str, Any], path: Path) -> None:
    """One HTML file: figures with intervals, and every text beside the base model's."""
    rows = [[column.text(row) for column in GENERATION_COLUMNS] for row in candidates(run)]
    names = list(run["texts"])
    samples = [
        (prompt, [_parted(run["texts"][name][place]) for name in names])
        for place, prompt in enumerate(run["prompts"])
    ]
    write_page(
        path,
        "generation.html.j2",
        filters={},
        run=run,
        titles=[one_line(column.title) for column in GENERATION_COLUMNS],
        rows=rows,
        note=interval_note(rows),
        figure=Markup(svg(divergence_figure(run), "g-")),
        names=names,
        samples=samples,
        signature=run["rows"][0]["bleu_signature"],
    )


def _parted(one: dict[str, Any]) -> tuple[str, str]:
    """A text as what it shares with the base model's, and the rest."""
    return one["prefix"], one["text"][len(one["prefix"]) :]


def write_rating_sheet(run: dict[str, Any], path: Path) -> None:
    """A CSV for a person to fill in: a line for each text, the rating left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sample", "model", "rating_1_to_5", "remark"])
    for place in range(len(run["prompts"])):
        writer.writerows([place + 1, name, "", ""] for name in run["texts"])
    write_text(path, out.getvalue())

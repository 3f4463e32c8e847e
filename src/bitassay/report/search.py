"""A search for people: the best recipes with intervals, the Pareto plot, which parameter mattered, and every
trial, in one HTML file that opens offline."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from bitassay.report.figures import COLOURS, INK, STYLE, svg
from bitassay.report.page import write_page
from bitassay.report.tables import Column, interval, number, printable, significant

Row = dict[str, Any]


def _with_interval(key: str, interval_key: str, title: str, form: Any) -> Column:
    def text(row: Row) -> str:
        pair = row[interval_key]
        return form(row[key]) + (f" {interval(form)(pair)}" if pair else "")

    return Column(key, f"{title}\n[95 %]", text, whole_row=True, also=(interval_key,))


def _differences(row: Row) -> str:
    """KL less that of each recipe that was written by hand, itself left out."""
    return "; ".join(
        f"{name} {found['kl']:+.4g}"
        + (f" {interval(significant(4))(found['interval'])}" if found["interval"] else "")
        for name, found in row["against"].items()
        if name != row["recipe"]
    )


SEARCH_COLUMNS = [
    Column("recipe", "recipe", align="left"),
    Column("bits_per_weight", "bits/\nweight", number(3)),
    _with_interval("ppl", "ppl_ci", "ppl", significant(4)),
    _with_interval("kl_mean", "kl_ci", "KL to base", significant(4)),
    Column("against", "KL less that of\n[95 %]", _differences, align="left", whole_row=True),
]


def pareto_figure(run: Row) -> Figure:
    """Every complete trial by its first two objectives, or by size where there is one; the best joined."""
    texts = run["settings"]["objectives"]
    complete = [trial for trial in run["trials"] if trial["state"] == "complete"]

    def place(trial: Row) -> tuple[float, float]:
        values = trial["objectives"]
        return (values[1] if len(values) > 1 else trial["row"]["bits_per_weight"]), values[0]

    def is_best(trial: Row) -> bool:
        return f"{run['settings']['space']['name']}-{trial['number']:03d}" in run["best"]

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        axes = figure.add_subplot()
        others = [place(trial) for trial in complete if not is_best(trial)]
        best = sorted(place(trial) for trial in complete if is_best(trial))
        if others:
            axes.plot(*zip(*others, strict=True), "o", color=INK, alpha=0.45, label="complete trials")
        axes.plot(*zip(*best, strict=True), "D-", color=COLOURS[2], label="best")
        axes.set(
            xlabel=printable(texts[1] if len(texts) > 1 else "bits_per_weight"), ylabel=printable(texts[0])
        )
        axes.legend(frameon=False)
    return figure


def importance_figure(run: Row) -> Figure | None:
    """The share of each parameter in each objective; None where no importance is known."""
    known = {text: found for text, found in run["importance"].items() if found}
    if not known:
        return None
    names = list(next(iter(known.values())))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.8 + 0.3 * len(names) * len(known)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(known)
        for index, (text, found) in enumerate(known.items()):
            places = [row + index * height for row in range(len(names))]
            axes.barh(
                places,
                [found.get(name, 0.0) for name in names],
                height=height,
                color=COLOURS[1 + index % (len(COLOURS) - 1)],
                label=printable(text),
            )
        axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], [printable(n) for n in names])
        axes.invert_yaxis()
        axes.set(xlabel="share of importance", xlim=(0, 1))
        axes.legend(frameon=False)
    return figure


def write_search_report(run: Row, path: Path) -> None:
    """One HTML file of a run that `search` returned."""
    names = list(run["settings"]["space"]["parameters"])
    importance = importance_figure(run)
    write_page(
        path,
        "search.html.j2",
        filters={},
        run=run,
        titles=[column.title.replace("\n", " ") for column in SEARCH_COLUMNS],
        rows=[[column.text(row) for column in SEARCH_COLUMNS] for row in run["rows"]],
        pareto=Markup(svg(pareto_figure(run), "p-")),
        importance=None if importance is None else Markup(svg(importance, "i-")),
        names=names,
        trials=[
            (
                trial["number"],
                [_shown(trial["values"].get(name)) for name in names],
                ", ".join(map(significant(4), trial["objectives"] or [])) or trial["stopped"],
            )
            for trial in run["trials"]
        ],
    )


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

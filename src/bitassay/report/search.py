"""A search for people: the best recipes with intervals, the Pareto plot, which parameter mattered, and every
trial, in one HTML file that opens offline."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from bitassay.report.bench import page_table, write_tables
from bitassay.report.figures import COLOURS, INK, STYLE, svg
from bitassay.report.tables import Column, interval, number, printable, significant, with_interval

Row = dict[str, Any]


def _differences(row: Row) -> str:
    """KL less that of each recipe that was written by hand, itself left out."""
    return "; ".join(
        f"{name} {found['kl']:+.4g} {interval(significant(4))(found['kl_ci'])}"
        for name, found in row["against"].items()
        if name != row["recipe"]
    )


SEARCH_COLUMNS = [
    Column("recipe", "recipe", align="left"),
    Column("bits_per_weight", "bits/\nweight", number(3)),
    with_interval("ppl", "ppl\n[95 %]", significant(4)),
    with_interval("kl_mean", "KL to base\n[95 %]", significant(4), "kl_ci"),
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
    settings, importance = run["settings"], importance_figure(run)
    limits = "".join(f", {name} at most {most:g}" for name, most in settings["at_most"].items())
    lead = [
        f"{len(run['trials'])} trials by {settings['sampler']} for the least "
        f"{' and '.join(settings['objectives'])}{limits}. {settings['windows']} windows of "
        f"{settings['window']} tokens of {settings['corpus']} chose; the first table is of as many others.",
        f"Intervals: {run['interval']}. The recipes are in best/ beside this page. Run {run['run_id']}, "
        f"{run['created']}.",
    ]
    figures = [
        {
            "title": "Trials by objective",
            "svg": Markup(svg(pareto_figure(run), "p-")),
            "text": "On the windows that chose, so the best look better here than in the table.",
        }
    ]
    if importance is not None:
        figures.append(
            {
                "title": "Which parameter mattered",
                "svg": Markup(svg(importance, "i-")),
                "text": "PED-ANOVA over the trials. With few trials this says little.",
            }
        )
    tables = [
        page_table("The best recipes", SEARCH_COLUMNS, run["rows"]),
        page_table("Every trial", *_trials(run)),
    ]
    title = f"{settings['space']['name']}: recipes of {run['model']['name']}"
    write_tables(path, title, lead, figures, tables, run["environment"])


def _trials(run: Row) -> tuple[list[Column], list[Row]]:
    """The number of every trial, its values, and what came of it."""
    names = list(run["settings"]["space"]["parameters"])
    rows = [
        {name: _shown(trial["values"].get(name)) for name in names}
        | {"trial": trial["number"]}
        | {"result": ", ".join(map(significant(4), trial["objectives"] or [])) or str(trial["stopped"])}
        for trial in run["trials"]
    ]
    left = [Column("result", "result", align="left")]
    return [Column("trial", "trial"), *(Column(name, name) for name in names), *left], rows


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

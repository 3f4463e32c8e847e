"""The page of a run of any kind, as `pages.yaml` describes it.
A new kind of run gets its fields in `record/result.py`, its columns in `columns.yaml` and an entry in
`pages.yaml`: titles, texts, tables, plots, facts."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, TemplateError

from bitassay.errors import BitassayError
from bitassay.record.files import write_text
from bitassay.record.result import read_run
from bitassay.report import columns, findings
from bitassay.report.figures import assay, bench, heat_maps, studies
from bitassay.report.figures.drawing import write_png
from bitassay.report.page import MOST_ROWS, Page, Section, write_page
from bitassay.report.tables import Column, Run, UnshownError, percent, pivot, render, significant

DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, TemplateError)


def page_of(run: Run) -> Page:
    """Return the page of a run of any kind, as `record.result` reads it."""
    content = _contents()[run["kind"]]
    values = {**run, "run": {**run, "rows": run.get("rows", [])[:MOST_ROWS]}}  # plots are of the first rows
    sections = [section for part in content["sections"] for section in _sections(part, values)]
    for part in run.get("runs", []):
        sections.append(page_of(part).sections[0])
    sections += [section for part in _contents()["provenance"] for section in _sections(part, values)]
    origin, run_id = run["model"].get("origin"), run["run_id"]
    source = (str(origin or ""), run_id and f"run {run_id}", run["created"])
    csv_rows, csv_columns = (_value(expression, {**run, "run": run}) for expression in content["csv"])
    return Page(
        title=_text(content["title"], values),
        source=" · ".join(filter(None, source)),
        lead=_text(content["lead"], values).split("\n"),
        sections=sections,
        csv=(csv_rows, csv_columns),
        glossary=content.get("glossary", {}),
    )


def _sections(part: Mapping[str, Any], values: Mapping[str, Any]) -> list[Section]:
    """The section of an entry, or one for each of its items; none where there is nothing to show."""
    sections = []
    for item in _value(part.get("each", "[none]"), values):
        known = {**values, "item": item}
        figure = _value(part.get("figure", "none"), known)
        section = Section(
            title=_text(part["title"], known),
            text=_text(part.get("text", ""), known),
            rows=_value(part.get("rows", "[]"), known),
            columns=_value(part.get("columns", "[]"), known),
            figures=figure if isinstance(figure, list) else [figure],
            facts=_value(part.get("facts", "{}"), known) or {},
            data=_value(part.get("data", "none"), known) or None,
            notes=_text(part.get("notes", ""), known).split("\n"),
            place=part.get("place", "page"),
            wraps=part.get("wraps", False),
        )
        if section.text or section.rows or section.facts or section.data or any(section.figures):
            sections.append(section)
    return sections


@cache
def _contents() -> dict[str, Any]:
    return yaml.safe_load((files("bitassay") / "report" / "pages.yaml").read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    """Where the texts and expressions are evaluated. Nothing is escaped here: the page does that."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    for module in (columns, findings, assay, bench, heat_maps, studies):
        environment.globals |= {name: value for name, value in vars(module).items() if callable(value)}
    environment.globals |= {"pivot": pivot, "scalars": scalars, "nested": nested, "columns": columns.COLUMNS}
    environment.filters |= {"few": significant(3), "percent": percent(0)}
    environment.filters |= {"distribution_figure": studies.distribution_figure}
    return environment


def scalars(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are single values."""
    return {key: value for key, value in settings.items() if not isinstance(value, dict | list)}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are lists or objects."""
    return {key: value for key, value in settings.items() if isinstance(value, dict | list)}


def _text(template: str, values: Mapping[str, Any]) -> str:
    return _environment().from_string(template).render(values).strip()


def _value(expression: str, values: Mapping[str, Any]) -> Any:
    return _environment().compile_expression(expression, undefined_to_none=False)(values)


def write_report(run: Run, path: Path) -> None:
    """Write the page of one run."""
    write_page([page_of(run)], path)


def write_reports(folders: Sequence[Path], out: Path) -> None:
    """Write one page of the runs of several folders. Raises BitassayError for what is no run, or a damaged
    one."""
    if not folders:
        raise BitassayError("no run folder was given", "bitassay report runs/demo --out report.html")
    runs = [read_run(folder) for folder in folders]
    try:
        write_page([page_of(run) for run in runs], out)
    except DAMAGED as error:
        if isinstance(error, BitassayError) and not isinstance(error, UnshownError):
            raise
        message = (
            error.problem if isinstance(error, BitassayError) else f"{type(error).__name__} {error!s:.200}"
        )
        raise BitassayError(
            f"{', '.join(map(str, folders))}: not as this version writes it: {' '.join(message.split())}",
            "run the same command again",
        ) from error


def write_picture(run: Run, path: Path) -> None:
    """Write the summary plot of an assay as a PNG file."""
    write_png(assay.summary_figure(run), path, dpi=160)


def write_rating_sheet(run: Run, path: Path) -> None:
    """Write a CSV for a person to fill in: a line for each text of a run of `generate`."""
    keys = ("sample", "model", "rating_1_to_5", "remark")
    numbers = range(1, len(run["prompts"]) + 1)
    rows = [{"sample": number, "model": name} for number in numbers for name in run["texts"]]
    write_text(path, render(rows, [Column(key, key) for key in keys], "csv"))


def write_heat_map(run: Run, path: Path) -> None:
    """Write the heat maps of an analysis as a PNG file."""
    write_png(heat_maps.heat_map_figure(run), path)

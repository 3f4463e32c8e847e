"""One page for every kind of run: sections of text, tables, plots and facts.
They are filled into `page.html.j2` as one HTML file that opens offline. `pages.yaml` says what a section
holds; text is always escaped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bitassay.record.files import write_text
from bitassay.report.figures.drawing import svg
from bitassay.report.tables import Column, Row, interval_note, plain, shown_columns

NO_BREAK = "\N{NO-BREAK SPACE}"
MOST_ROWS = 1000  # of a table on a page
Table = tuple[Sequence[Row], Sequence[Column]]


@dataclass(frozen=True)
class Section:
    """A heading and what is under it: text, plots, a table without its empty columns, notes, facts, and data
    as folded-up JSON. place: where it is shown. wraps: the cells of the table hold long texts."""

    title: str
    text: str = ""
    rows: Sequence[Row] = ()
    columns: Sequence[Column] = ()
    figures: Sequence[Figure | None] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    place: Literal["page", "terminal", "both"] = "page"
    wraps: bool = False

    def filled(self, prefix: str) -> dict[str, Any]:
        """Return what the template shows; `prefix` starts the ids of the plots."""
        rows = self.rows[:MOST_ROWS]
        columns = shown_columns(self.columns, rows) if rows else []
        left_out = len(self.rows) - len(rows)
        notes = [
            interval_note([column.text(row) for row in rows for column in columns]),
            f"{left_out} more rows are in run.json" if left_out else "",
            *self.notes,
        ]
        return {
            "title": self.title,
            "text": self.text,
            "figures": [
                Markup(svg(figure, f"{prefix}f{number}-"))
                for number, figure in enumerate(self.figures)
                if figure is not None
            ],
            "head": [(column.heading.replace(" %", NO_BREAK + "%"), column.align) for column in columns],
            "rows": [[(column.shown(row), column.align) for column in columns] for row in rows],
            "notes": [note for note in notes if note],
            "facts": self.facts,
            "data": None if self.data is None else json.dumps(self.data, indent=2, ensure_ascii=False),
            "wraps": self.wraps,
        }


@dataclass(frozen=True)
class Page:
    """What is said of one run. lead: paragraphs under the title; source: which run of which model; glossary:
    what the columns mean; csv: the table that CSV has."""

    title: str
    source: str
    lead: Sequence[str]
    sections: Sequence[Section]
    csv: Table
    glossary: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise UnshownError for a row of the main table that a column cannot show; plots show some alone."""
        rows, columns = self.csv
        for row in rows:
            for column in columns:
                column.text(row)

    @property
    def printed(self) -> list[Table]:
        """The tables that the terminal shows, without their empty columns."""
        return [
            (section.rows, shown_columns(section.columns, section.rows))
            for section in self.sections
            if section.place != "page" and section.rows
        ]


def write_page(pages: Sequence[Page], path: Path) -> None:
    """Write one HTML file of one or several runs. Raises UnshownError for a row that a column cannot show."""
    for page in pages:
        page.check()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    source = (files("bitassay") / "report" / "page.html.j2").read_text(encoding="utf-8")
    articles = [
        {
            "id": f"run{number}",
            "title": page.title,
            "source": page.source,
            "lead": [text for text in page.lead if text],
            "sections": [
                section.filled(f"run{number}s{index}")
                for index, section in enumerate(page.sections)
                if section.place != "terminal"
            ],
        }
        for number, page in enumerate(pages, 1)
    ]
    glossary = {term: text for page in pages for term, text in page.glossary.items()}
    write_text(path, environment.from_string(source).render(articles=articles, glossary=glossary))

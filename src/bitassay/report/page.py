"""Pages: templates that lie beside this file, filled in as one HTML file that opens offline."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from bitassay.record.files import write_text


def write_page(
    path: Path, template: str, /, *, filters: dict[str, Callable[..., Any]], **values: Any
) -> None:
    """Fill in `template` (a file name) and write it to `path`. What a template names must be there, and text
    is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    source = (files("bitassay") / "report" / template).read_text(encoding="utf-8")
    write_text(path, environment.from_string(source).render(values))

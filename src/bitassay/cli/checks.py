"""Check the words of a command line before torch is imported, which takes seconds.
They are names, files that are read, and places that are written to."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bitassay.errors import BitassayError
from bitassay.record.files import check_folder, check_place, read_text


def check_words(
    models: Iterable[str | None] = (),
    recipes: Sequence[str | None] | None = None,
    *,
    folder: Path | None = None,
    file: Path | None = None,
    texts: Iterable[Path | None] = (),
) -> None:
    """Refuse names that do not exist, files of prompts (`texts`) that cannot be read, and a `folder` or
    `file` that cannot be written. None is skipped. Raises BitassayError or MissingError."""
    from bitassay.models.source import check_name
    from bitassay.quantization.recipe.files import read_recipe_file, recipe_file

    for name in models:
        if name is not None:
            check_name(name)
    named = [name for name in recipes or () if name is not None]
    for name in named:
        if (path := recipe_file(name)).suffix and str(path) == name:
            read_recipe_file(path)
    if repeated := [name for name in named if named.count(name) > 1]:
        raise BitassayError(f"--recipe {repeated[0]} is given twice", "name each recipe once")
    for path in texts:
        if path is not None:
            read_text(path)
    check_folder(folder)
    if file is not None:
        check_place(file)

"""What can be told from the words of a command line alone, before torch is imported, which takes seconds:
names, files that are read, and places that are written to."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def check_words(
    models: Iterable[str | None] = (),
    recipes: Sequence[str] | None = None,
    *,
    folder: Path | None = None,
    file: Path | None = None,
    texts: Iterable[Path | None] = (),
) -> None:
    """folder and file: to be written; texts: files of prompts. Raises BitassayError, MissingError."""
    from bitassay.errors import BitassayError
    from bitassay.record.files import check_folder, check_place, read_text

    for name in models:
        if name is not None:
            from bitassay.models.source import check_name

            check_name(name)
    if recipes:
        from bitassay.quantization.recipe.files import read_recipe_file, recipe_file

        for name in recipes:
            if (path := recipe_file(name)).suffix and str(path) == name:
                read_recipe_file(path)
        if twice := [name for name in recipes if recipes.count(name) > 1]:
            raise BitassayError(f"--recipe {twice[0]} is given twice", "name each recipe once")
    for path in texts:
        if path is not None:
            read_text(path)
    if folder is not None:
        check_folder(folder)
    if file is not None:
        check_place(file)

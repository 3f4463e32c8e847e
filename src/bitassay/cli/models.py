"""`bitassay models`: the catalogue, and whether a model is whole."""

from cyclopts import App

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, NEWEST, Loading, Revision
from bitassay.report.tables import Column, size

models = App(name="models", help="List, pull and check models.")

_CATALOGUE = (
    Column("name", "name", align="left"),
    Column("parameters", "parameters"),
    Column("licence", "licence", align="left"),
    Column("cached", "cached", lambda cached: "yes" if cached else "no", align="left"),
    Column("source", "source", align="left"),
    Column("note", "note", align="left"),
)
_PULLED = (
    Column("name", "name", align="left"),
    Column("size_bytes", "size", size),
    Column("origin", "origin", align="left"),
    Column("folder", "folder", align="left"),
)
_CHECKED = (Column("property", "property", align="left"), Column("value", "value", align="left"))


@models.command(name="list")
def list_(*, format: Format = "table") -> int:
    """The models that go by a short name.

    Args:
        format: What to print on stdout.
    """
    from bitassay.models.catalogue import CATALOGUE
    from bitassay.models.source import is_cached

    rows = [
        {
            "name": found.name,
            "parameters": found.parameters,
            "licence": found.licence,
            "cached": is_cached(found),
            "source": found.source,
            "note": found.note,
        }
        for found in CATALOGUE.values()
    ]
    emit(rows, _CATALOGUE, format)
    return 0


@models.command
def pull(model: str, *, revision: Revision = NEWEST, format: Format = "table") -> int:
    """Fetch MODEL into the cache, and convert it where needed.

    Args:
        model: A name from `bitassay models list`, a hub id, or a .gguf file, which is dequantized.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words
    from bitassay.cli.progress import show_progress
    from bitassay.models.source import resolve

    check_words([model])

    with show_progress() as progress:
        source = resolve(revision.of(model), progress)
    row = {
        "name": source.name,
        "size_bytes": sum(path.stat().st_size for path in source.folder.iterdir()),
        "origin": source.origin,
        "folder": str(source.folder),
    }
    emit([row], _PULLED, format)
    return 0


@models.command
def check(
    model: str,
    *,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Read all of MODEL, run it once, and say what it is.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words

    check_words([model])
    from bitassay.cli.progress import show_progress
    from bitassay.engines.check import check as check_model

    with show_progress() as progress:
        found = check_model(loading.of(model), progress=progress, **loading.options).to_dict()
    emit([{"property": key, "value": value} for key, value in found.items()], _CHECKED, format, whole=found)
    return 0

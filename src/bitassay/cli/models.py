"""`bitassay models`: the catalogue, and whether a model is whole."""

from cyclopts import App

from bitassay.cli.checks import check_words
from bitassay.cli.options import Loading, Model, Output, Revision
from bitassay.cli.progress import show_progress
from bitassay.report.tables import Column, size

models = App(name="models", help="List, pull and check models.")


@models.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the models that have a short name."""
    from bitassay.models.catalogue import CATALOGUE
    from bitassay.models.source import is_cached

    columns = ["name", "parameters", "licence", "cached", "source", "note"]
    rows = [
        {key: is_cached(entry) if key == "cached" else getattr(entry, key) for key in columns}
        for entry in CATALOGUE.values()
    ]
    output.emit((rows, columns))
    return 0


@models.command
def pull(model: Model, *, revision: Revision = Revision(), output: Output = Output()) -> int:
    """Fetch MODEL into the cache. A .gguf file is dequantized there."""
    check_words([model])
    from bitassay.models.source import resolve

    with show_progress() as progress:
        source = resolve(revision.of(model), progress)
    row = {
        "name": source.name,
        "size_bytes": sum(path.stat().st_size for path in source.folder.iterdir()),
        "origin": source.origin,
        "folder": str(source.folder),
    }
    output.emit(([row], ["name", Column("size_bytes", "size", size), "origin", "folder"]))
    return 0


@models.command
def check(model: Model, *, loading: Loading = Loading(), output: Output = Output()) -> int:
    """Read all of MODEL, run it once, and describe it."""
    check_words([model])
    from bitassay.engines.check import check as check_model

    with show_progress() as progress:
        properties = check_model(loading.of(model), progress=progress, **loading.options)
    rows = [{"property": key, "value": value} for key, value in properties.items()]
    output.emit((rows, [Column("property", "property", align="left"), "value"]), json=properties)
    return 0

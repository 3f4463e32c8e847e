"""`bitassay eval`: perplexity and divergence, without the rest of an assay."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import Names

if TYPE_CHECKING:
    from bitassay.data.windows import Protocol
    from bitassay.record.progress import Progress

WINDOWS = 16


def eval(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    against: str | None = None,
    protocol: Names | None = None,
    windows: int | None = None,
    window: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "table",
) -> int:
    """Perplexity of MODEL; with --recipe or --against also divergence, with paired intervals.

    Args:
        model: A name from `bitassay models list`, a folder (a quantized one too), a .gguf file or a
            hub id.
        recipe: Evaluate MODEL quantized by this recipe, against MODEL itself; may be repeated.
        against: Compare MODEL with this model instead; both must share a vocabulary.
        protocol: wikitext2-raw, c4-new, ptb-new, c4-train-new, or an id that says all, such as c4-new/2048
            (every window, as published) or ptb-new/512[n=16]; several may follow (default: wikitext2-raw).
        windows: How many windows of the text, evenly spaced; 0 means all of them (default: 16, for a
            protocol without an id).
        window: Tokens in a window (default: 2048).
        dtype: Arithmetic of both models.
        seed: Of the bootstrap.
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.errors import BitassayError
    from bitassay.evaluate.compare import evaluate
    from bitassay.models.load import load
    from bitassay.quantize.pipeline import quantize_once
    from bitassay.report.assay import QUALITY_COLUMNS

    if recipe and against:
        raise BitassayError("--recipe and --against both name a comparison", "give one of them")
    protocols = [_protocol(text, window, windows) for text in protocol or ["wikitext2-raw"]]
    with show_progress() as progress:
        loaded = load(model, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code)
        if recipe:
            pairs = [(name, quantize_once(loaded, name, progress=progress), loaded) for name in recipe]
        elif against:
            pairs = [
                (
                    model,
                    loaded,
                    load(against, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code),
                )
            ]
        else:
            pairs = [(model, loaded, None)]
        _warn_of_seen_text(recipe or [], protocols, progress)
        found = [
            (name, evaluate(candidate, against=base, protocol=one, seed=seed, progress=progress))
            for one in protocols
            for name, candidate, base in pairs
        ]
    rows = [
        {"recipe": name, "protocol": e.protocol, "against": e.base, **e.quality.to_dict()}
        for name, e in found
    ]
    emit(rows, QUALITY_COLUMNS, format)
    return 0


def _protocol(text: str, window: int | None, windows: int | None) -> "Protocol":
    """A name alone is measured on a few windows, an id on what it says."""
    from bitassay.data.windows import Protocol

    is_name = not {"/", "["} & set(text)
    given = WINDOWS if windows is None and is_name else windows or None
    return Protocol.parse(text, window_tokens=window, windows=given)


def _warn_of_seen_text(recipes: list[str], protocols: "list[Protocol]", progress: "Progress") -> None:
    from bitassay.data.corpora import same_text
    from bitassay.quantize.calibration import Calibration
    from bitassay.quantize.recipe import find_recipe

    for recipe in map(find_recipe, recipes):
        corpus = (recipe.calibration or Calibration()).corpus
        for one in protocols:
            if recipe.is_calibrated and same_text(corpus, one.corpus):
                progress(f"{recipe.name} was calibrated on the text of {one.id}, which flatters it")

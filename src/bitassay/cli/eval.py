"""`bitassay eval`: perplexity and divergence, without the rest of an assay."""

from typing import Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit


def eval(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    against: str | None = None,
    windows: int | None = 16,
    window: int = 2048,
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
        windows: How many windows of WikiText-2, evenly spaced; 0 means all of them, the published
            protocol.
        window: Tokens in a window.
        dtype: Arithmetic of both models.
        seed: Of the bootstrap.
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.errors import BitassayError
    from bitassay.evaluate.compare import evaluate
    from bitassay.models.load import load
    from bitassay.quantize.pipeline import quantize_once
    from bitassay.report.assay import QUALITY_COLUMNS

    if recipe and against:
        raise BitassayError("--recipe and --against both name a comparison", "give one of them")
    protocol = Protocol(window_tokens=window, windows=windows or None)
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
        found = [
            (n, evaluate(m, against=b, protocol=protocol, seed=seed, progress=progress)) for n, m, b in pairs
        ]
    rows = [
        {"recipe": name, "protocol": e.protocol, "against": e.base, **e.quality.to_dict()}
        for name, e in found
    ]
    emit(rows, QUALITY_COLUMNS, format)
    return 0

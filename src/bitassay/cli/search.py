"""`bitassay search`: the best recipes of a space, for several objectives and within limits."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bitassay.cli.output import Format, emit_run
from bitassay.cli.parameters import AS_IT_IS, Count, Dtype, Loading, Names, Seed


def search(
    space: str,
    *,
    model: str,
    objective: Annotated[list[str] | None, Parameter(negative=())] = None,
    at_most: Names | None = None,
    against: Names | None = None,
    sampler: Literal["tpe", "nsga2", "grid"] = "tpe",
    trials: Count = 60,
    jobs: Count = 1,
    corpus: str = "wikitext2-raw",
    windows: Count = 8,
    window: Count = 512,
    short: Count = 2,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Search SPACE for the best recipes of MODEL, and judge them on text that chose nothing.

    Writes run.json, report.html and best/*.yaml into a run folder. Interrupted, the same command goes on
    after the last finished trial; more --trials add to what there is. Exit status 1 where trials failed by a
    bug; the others count.

    Args:
        space: A YAML file (docs/search.md), or a shipped one: two-bit, w8a8, replication, loops.
        model: The base model: a name from `bitassay models list`, a folder, a .gguf file or a hub id.
        objective: What is to be small: a column of an assay, or a weighted sum such as
            "ppl_delta + 1e-9*size_bytes"; several give a Pareto front (default: kl_mean).
        at_most: Limits, such as bits_per_weight=2.3, size_bytes=8e7, or size_bytes=w2: what that recipe has.
        against: Recipes that the best are compared with; those in the space are tried first.
        sampler: tpe (Bayesian), nsga2 (evolutionary) or grid (every combination).
        trials: How many in all, those of earlier runs of the same command included.
        jobs: Processes that work on trials at the same time.
        corpus: The text, by its protocol's name.
        windows: How many windows choose; as many others judge.
        window: Tokens in a window.
        short: Windows that come first: a trial that half of the earlier ones dominate there stops.
        dtype: Arithmetic of all models.
        seed: Of the sampler.
        out: Run folder (default: runs/search-SPACE-ID).
        format: What to print on stdout; json has every trial.
    """
    from bitassay.cli.checks import check_words
    from bitassay.cli.progress import show_progress
    from bitassay.errors import MissingError

    check_words([model], against, folder=out)

    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingError("a search needs optuna", "pip install 'bitassay[search]'") from error
    from bitassay.search.objectives import parse_limit
    from bitassay.search.search import search
    from bitassay.search.trials import FAILED

    with show_progress() as progress:
        run, folder = search(
            loading.of(model),
            space,
            trials=trials,
            against=against or [],
            jobs=jobs,
            out=out,
            progress=progress,
            **loading.options,
            objectives=tuple(objective or ["kl_mean"]),
            at_most=dict(parse_limit(text) for text in at_most or []),
            sampler=sampler,
            corpus=corpus,
            windows=windows,
            window=window,
            short=short,
            dtype=dtype,
            seed=seed,
        )
    emit_run(run, format, folder / "report.html")
    failed = any((trial["stopped"] or "").startswith(FAILED) for trial in run["trials"])
    return 1 if failed else 0

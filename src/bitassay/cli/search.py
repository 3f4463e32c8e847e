"""`bitassay search`: the best recipes of a space, for several objectives and within limits."""

from typing import Annotated, Literal

from cyclopts import Parameter

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import MissingError


def search(
    space: str,
    *,
    model: options.Model,
    objective: Annotated[list[str] | None, Parameter(negative=())] = None,
    at_most: options.Names | None = None,
    against: options.Names | None = None,
    sampler: Literal["tpe", "nsga2", "grid"] = "tpe",
    trials: options.Count = 60,
    jobs: options.Count = 1,
    corpus: str = "wikitext2-raw",
    windows: options.Windows = 8,
    window: options.Window = 512,
    short: options.Count = 2,
    seed: options.Seed = 0,
    compute: options.Compute = options.Compute(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Search SPACE for the best recipes of MODEL, then judge the best on text that the search has not read.

    Also writes best/*.yaml into the run folder. An interrupted command continues after the last finished
    trial; with a larger --trials it adds to the finished ones. Exit status 1 where a trial failed by a bug;
    the other trials count.

    Args:
        space: A YAML file (docs/search.md), or a shipped one: two-bit, w8a8, replication, loops.
        objective: What to minimize: a column of an assay, or a weighted sum such as "ppl_delta +
            1e-9*size_bytes"; several give a Pareto front (default: kl_mean).
        at_most: Limits, such as bits_per_weight=2.3, size_bytes=8e7, or size_bytes=w2 for the size of recipe
            w2.
        against: Recipes to compare the best with. Those that are in the space are tried first.
        sampler: tpe (Bayesian), nsga2 (evolutionary) or grid (every combination).
        trials: Trials in all, including those of earlier runs of the same command.
        jobs: Processes that work on trials at the same time.
        corpus: The text that the search reads, named by its protocol. As many other windows of it judge the
            best recipes.
        short: Number of windows that each trial measures first. A trial stops after them if half of the
            earlier trials dominate it there.
    """
    check_words([model], against, folder=output.out)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingError("a search needs optuna", "pip install 'bitassay[search]'") from error
    from bitassay.search.objectives import parse_limit
    from bitassay.search.search import search
    from bitassay.search.trials import FAILED

    with show_progress() as progress:
        run, folder = search(
            compute.of(model),
            space,
            trials=trials,
            against=against or [],
            jobs=jobs,
            out=output.out,
            progress=progress,
            objectives=tuple(objective or ["kl_mean"]),
            at_most=dict(parse_limit(text) for text in at_most or []),
            sampler=sampler,
            corpus=corpus,
            windows=windows,
            window=window,
            short=short,
            seed=seed,
            **compute.options,
        )
    output.show_run(run, folder)
    return 1 if any((trial["stopped"] or "").startswith(FAILED) for trial in run["trials"]) else 0

"""`bitassay eval`: perplexity and divergence, or tasks, without the rest of an assay."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, Count, CountOrNone, Dtype, Loading, Names, Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.data.windows import Protocol
    from bitassay.evaluation.tasks.run import Candidate
    from bitassay.record.progress import Progress

WINDOWS = 16


def eval(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    against: str | None = None,
    protocol: Names | None = None,
    windows: CountOrNone | None = None,
    window: Count | None = None,
    tasks: str | None = None,
    limit: Count | None = None,
    shots: CountOrNone | None = None,
    include_path: Path | None = None,
    out: Path | None = None,
    controls: bool = True,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Perplexity of MODEL; with --recipe or --against also divergence, with paired intervals.

    A recipe with replication comes with its controls: plain recipes of equal bits and of equal work, and what
    the copies gain over each (on tasks, as further recipes). With --tasks, the share of questions answered
    rightly instead, beside the base model's, with tests. Finished parts are kept in a run folder:
    interrupted, the same command goes on.

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
        tasks: Tasks of lm-eval, with commas: mmlu, mmlu_generative, hellaswag, arc_challenge, mmlu_anatomy or
            any other by its name.
        limit: Ask so many items of each task (of each subject of MMLU), evenly spaced.
        shots: Examples shown before each question (default: 5 for MMLU, else the task's own).
        include_path: A folder with task YAML in lm-eval's form, for --tasks. YAML that names Python
            functions needs --trust-remote-code.
        out: Run folder of --tasks (default: runs/tasks-MODEL-ID).
        controls: Add the controls of recipes with replication.
        dtype: Arithmetic of both models.
        seed: Accepted by every verb, and recorded; nothing here is drawn at random.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words
    from bitassay.errors import BitassayError

    if recipe and against:
        raise BitassayError("--recipe and --against both name a comparison", "give one of them")
    if against == model and tasks is not None:
        raise BitassayError(f"{model} is named twice", "--against another model")
    if tasks is None and not (limit is shots is include_path is out is None):
        raise BitassayError("--limit, --shots, --include-path and --out belong to tasks", "--tasks hellaswag")
    if tasks is not None and not (protocol is window is windows is None):
        raise BitassayError(
            "--protocol, --window and --windows belong to perplexity, --tasks asks questions",
            "one command for each",
        )
    check_words([model, against], recipe, folder=out)
    from bitassay.cli.progress import show_progress
    from bitassay.data.corpora import check_corpus
    from bitassay.data.windows import token_windows
    from bitassay.engines.load import load
    from bitassay.evaluation.controls import evaluate_with_controls
    from bitassay.evaluation.quality import evaluate_all
    from bitassay.evaluation.tasks.run import check_tasks
    from bitassay.models.identity import tokenizer
    from bitassay.models.source import resolve
    from bitassay.models.windows import check_folder
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.pipeline import quantize_once
    from bitassay.quantization.recipe.recipe import BASE, find_recipe
    from bitassay.record.environment import environment
    from bitassay.report.assay import CONTROL_COLUMNS, QUALITY_COLUMNS

    protocols = [_protocol(text, window, windows) for text in protocol or ["wikitext2-raw"]]
    with show_progress() as progress:
        names = [name for name in (loading.of(model), against) if name is not None]
        options, recipes = loading.options, [find_recipe(one) for one in recipe or ()]
        trust = loading.trust_remote_code
        if tasks is not None:
            check_tasks(_names(tasks), limit, include_path, trust)
        for one in protocols if tasks is None else ():
            check_corpus(one.corpus)
        for name in names:
            check_fit(name, recipes, trust_remote_code=trust, progress=progress)
            for one in protocols if tasks is None else ():
                check_folder(resolve(name, progress).folder, one, trust_remote_code=trust)
        loaded, *other = [load(name, dtype=dtype, progress=progress, **options) for name in names]
        if tasks is not None:
            candidates = _candidates(names, [loaded, *other], recipe or [], controls, progress)
            asked = {"limit": limit, "shots": shots, "include": include_path, "trust_remote_code": trust}
            return _tasks(candidates, tasks, asked, out, format, progress)
        replicated = [name for name in recipe or [] if controls and find_recipe(name).replication is not None]
        base, plain = (other[0], {model: loaded}) if other else (loaded, {})
        for one in protocols:
            token_windows(tokenizer(base), one)  # refuses more windows than there are; the text is kept
        for name in recipe or []:
            if name not in replicated:
                plain[name] = quantize_once(loaded, name, progress=progress)
        _warn_of_seen_text(recipe or [], protocols, progress)
        found = []
        for one in protocols:
            if plain or not replicated:
                measured = evaluate_all(base, plain, protocol=one, progress=progress)
                for name in plain or [BASE]:
                    found.append({"recipe": name if plain else model, "evaluation": measured[name]})
            for name in replicated:
                found += evaluate_with_controls(loaded, find_recipe(name), one, progress=progress)
    rows = []
    for row in found:
        e = row.pop("evaluation")
        about = {"protocol": e.protocol, "source": e.corpus_source, "seed": seed, "against": e.base}
        rows.append(row | about | e.quality.to_dict())
    whole = {"rows": rows, "environment": environment()} if format == "json" else None
    emit(rows, CONTROL_COLUMNS if replicated else QUALITY_COLUMNS, format, whole)
    return 0


def _protocol(text: str, window: int | None, windows: int | None) -> "Protocol":
    """A name alone is measured on a few windows, an id on what it says."""
    from bitassay.data.windows import Protocol

    is_name = not {"/", "["} & set(text)
    given = WINDOWS if windows is None and is_name else windows or None
    return Protocol.parse(text, window_tokens=window, windows=given)


def _warn_of_seen_text(recipes: list[str], protocols: "list[Protocol]", progress: "Progress") -> None:
    from bitassay.data.corpora import same_text
    from bitassay.quantization.recipe.calibration import Calibration
    from bitassay.quantization.recipe.recipe import find_recipe

    for recipe in map(find_recipe, recipes):
        corpus = (recipe.calibration or Calibration()).corpus
        for one in protocols:
            if recipe.is_calibrated and same_text(corpus, one.corpus):
                progress(f"{recipe.name} was calibrated on the text of {one.id}, which flatters it")


def _candidates(
    names: list[str],
    models: "list[PreTrainedModel]",
    recipes: list[str],
    controls: bool,
    progress: "Progress",
) -> "list[Candidate]":
    """Who is asked, the one that others are compared with first."""
    from bitassay.evaluation.tasks.run import loaded_candidate, quantized_candidate
    from bitassay.models.walk import decoder_layers
    from bitassay.quantization.recipe.recipe import BASE, find_recipe
    from bitassay.quantization.replication.controls import with_controls

    if not recipes:
        return [loaded_candidate(model, name) for name, model in zip(names[::-1], models[::-1], strict=True)]
    (base,) = models
    asked = tuple(find_recipe(recipe) for recipe in recipes)
    if controls:
        asked, _ = with_controls(asked, len(decoder_layers(base)))
    return [
        loaded_candidate(base, BASE),
        *(quantized_candidate(base, one, progress) for one in asked),
    ]


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _tasks(
    candidates: "list[Candidate]",
    tasks: str,
    asked: dict[str, Any],
    out: Path | None,
    format: Format,
    progress: "Progress",
) -> int:
    import sys

    from bitassay.evaluation.tasks.run import evaluate_tasks
    from bitassay.record.environment import environment
    from bitassay.report.tasks import TASK_COLUMNS

    run, folder = evaluate_tasks(
        candidates,
        _names(tasks),
        **asked,
        out=out,
        environment=environment(),
        progress=progress,
    )
    emit(run["rows"], TASK_COLUMNS, format, whole=run)
    print(f"run: {folder}", file=sys.stderr)
    return 0

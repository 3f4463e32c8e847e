"""`bitassay eval`: perplexity and divergence, or tasks, without the rest of an assay."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.data.windows import Protocol
    from bitassay.evaluation.tasks.run import Candidate
    from bitassay.quantization.recipe.recipe import Recipe
    from bitassay.record.progress import Progress

WINDOWS = 16


def eval(
    model: options.Model,
    *,
    recipe: options.Recipes | None = None,
    against: str | None = None,
    engine: str = "transformers",
    protocol: options.Names | None = None,
    windows: options.CountFromZero | None = None,
    window: options.Window | None = None,
    tasks: str | None = None,
    limit: options.Count | None = None,
    shots: options.CountFromZero | None = None,
    include_path: Path | None = None,
    controls: options.Controls = True,
    seed: options.UnusedSeed = 0,
    compute: options.Bounded = options.Bounded(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Measure the perplexity of MODEL; with --recipe or --against also the divergence, with paired intervals.

    A recipe with replication is compared with its controls, plain recipes of equal bits and of equal work
    (with --tasks, the controls are rows like other recipes). --tasks measures the share of correct answers
    instead, compared with the base model's by tests, and keeps finished parts in a run folder: an interrupted
    command continues when it is run again. Without --recipe and --against, only MODEL is measured.

    Args:
        against: Compare MODEL with this model. Both must have the same vocabulary.
        engine: Who runs MODEL: transformers, llama.cpp (a .gguf file), vllm, or a plug-in. The model of
            --against runs in transformers, on the same token ids; it may be MODEL itself. Tasks are answered
            one text at a time.
        protocol: wikitext2-raw, c4-new, ptb-new, c4-train-new, or a complete id such as c4-new/2048 (every
            window, as published) or ptb-new/512[n=16]; several are allowed (default: wikitext2-raw).
        windows: How many windows of the text, evenly spaced; 0 means all (default: 16 for a protocol that
            is not a complete id). A window has 2048 tokens by default.
        tasks: Tasks of lm-eval, separated by commas: mmlu, mmlu_generative, hellaswag, arc_challenge,
            mmlu_anatomy or any other by its name.
        limit: Ask this many items of each task (of each subject of MMLU), evenly spaced.
        shots: Examples shown before each question (default: 5 for MMLU, otherwise the task's own).
        include_path: A folder with task YAML in lm-eval's form, for --tasks. YAML that names Python functions
            needs --trust-remote-code.
    """
    if recipe and against:
        raise BitassayError("--recipe and --against both name a comparison", "give one of them")
    hosted = engine != "transformers"
    if against == model and tasks is not None and not hosted:
        raise BitassayError(f"{model} is named twice", "--against another model")
    if tasks is None and not (limit is shots is include_path is output.out is None):
        raise BitassayError("--limit, --shots, --include-path and --out belong to tasks", "--tasks hellaswag")
    if tasks is not None and not (protocol is window is windows is None):
        raise BitassayError(
            "--protocol, --window and --windows belong to perplexity, --tasks asks questions",
            "one command for each",
        )
    check_words([model, against], recipe, folder=output.out)
    compute.check_engine(engine, recipe)
    from bitassay.data.corpora import check_corpus
    from bitassay.data.windows import Protocol, token_windows
    from bitassay.engines.engine import engine_of
    from bitassay.engines.load import load
    from bitassay.evaluation.controls import evaluate_with_controls
    from bitassay.evaluation.memory import memory_of
    from bitassay.evaluation.quality import INTERVAL, evaluate_all
    from bitassay.evaluation.tasks.run import check_tasks, evaluate_tasks
    from bitassay.models.empty import without_weights
    from bitassay.models.identity import tokenizer
    from bitassay.models.options import as_dtype
    from bitassay.models.positions import check_folder
    from bitassay.models.source import resolve
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.export.plan import LOADED, OPENED, choose_way
    from bitassay.quantization.pipeline import quantize_cached
    from bitassay.quantization.recipe.recipe import BASE, find_recipe
    from bitassay.record.environment import environment
    from bitassay.record.result import new_run

    protocols: list[Protocol] = []
    for name in protocol or ["wikitext2-raw"] if tasks is None else []:
        is_id = "/" in name or "[" in name  # a complete id says how many windows
        count = WINDOWS if windows is None and not is_id else windows or None
        protocols.append(Protocol.parse(name, window_tokens=window, windows=count))
    with show_progress() as progress:
        loading, trust = compute.options, compute.trust_remote_code
        recipes = [find_recipe(name) for name in recipe or ()]
        names = [name for name in (compute.of(model), against) if name is not None]
        task_names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if tasks is not None:
            check_tasks(task_names, limit, include_path, trust)
        for text in protocols:
            check_corpus(text.corpus)
        for name in names:
            check_fit(name, recipes, trust_remote_code=trust, progress=progress)
            for text in protocols:
                check_folder(resolve(name, progress).folder, text, trust_remote_code=trust)
        empty = [
            without_weights(resolve(name, progress), dtype=as_dtype(compute.dtype), trust_remote_code=trust)
            for name in names
        ]
        ways = [memory_of(empty, recipes, text) for text in protocols or [Protocol()]]
        if tasks is not None or (controls and any("replication" in item.parts for item in recipes)):
            ways = [{LOADED: each[LOADED]} for each in ways]  # read again and again
        worst = max(ways, key=lambda each: max(each.values()))
        way, peak = choose_way(worst, compute.memory, f"evaluating {model}")
        if way == OPENED:
            progress(f"the models are read {way}, in about {peak / 1e9:.1f} GB of memory")
            loading["opened"] = True
        if hosted:
            loaded = compute.load_for(engine, names[0], progress=progress)
            other = [load(name, progress=progress, **loading) for name in names[1:]]
        else:
            loaded, *other = [load(name, progress=progress, **loading) for name in names]
        if tasks is not None:
            labels = [f"{names[0]} in {engine}" if hosted else names[0], *names[1:]]
            run, folder = evaluate_tasks(
                _candidates(labels, [loaded, *other], recipes, controls, progress),
                task_names,
                limit=limit,
                shots=shots,
                include=include_path,
                trust_remote_code=trust,
                out=output.out,
                progress=progress,
            )
            output.show_run(run, folder)
            return 0
        label = f"{model} in {engine}" if hosted else model
        base, compared = (other[0], {label: loaded}) if other else (loaded, {})
        for text in protocols:
            token_windows(tokenizer(base), text)  # refuses more windows than there are; the result is cached
        replicated = [recipe for recipe in recipes if controls and "replication" in recipe.parts]
        for name, plain in zip(recipe or (), recipes, strict=True):
            if plain not in replicated:
                compared[name] = quantize_cached(loaded, plain, progress=progress)
        _warn_of_seen_text(recipes, protocols, progress)
        measured: list[dict[str, Any]] = []
        for text in protocols:
            if compared or not replicated:
                evaluations = evaluate_all(base, compared, protocol=text, progress=progress)
                measured += [
                    {"recipe": name if compared else label, "evaluation": evaluations[name]}
                    for name in compared or [BASE]
                ]
            for replica in replicated:
                measured += evaluate_with_controls(loaded, replica, text, progress=progress)
    rows = []
    for row in measured:
        e = row.pop("evaluation")
        about = {"protocol": e.protocol, "source": e.corpus_source, "seed": seed, "against": e.base}
        rows.append(row | about | e.quality.to_dict())
    settings = {"protocols": [text.id for text in protocols], "dtype": compute.dtype, "seed": seed}
    if hosted:
        settings["engine"] = engine_of(loaded).numerics()
    machine = environment("cpu" if hosted and base is loaded else base.device)
    about = {"model": {"name": names[0]}, "settings": settings, "environment": machine}
    output.emit_run(new_run("evaluation", **about, interval=INTERVAL, rows=rows))
    return 0


def _warn_of_seen_text(recipes: "list[Recipe]", protocols: "list[Protocol]", progress: "Progress") -> None:
    from bitassay.data.corpora import same_text

    for recipe in recipes:
        corpus = recipe.text.corpus
        for text in protocols:
            if recipe.is_calibrated and same_text(corpus, text.corpus):
                progress(f"{recipe.name} was calibrated on the text of {text.id}, which favours it")


def _candidates(
    names: list[str],
    models: "list[PreTrainedModel]",
    recipes: "list[Recipe]",
    controls: bool,
    progress: "Progress",
) -> "list[Candidate]":
    """Return the models that answer the tasks; the others are compared with the first."""
    from bitassay.evaluation.tasks.run import loaded_candidate, quantized_candidate
    from bitassay.models.walk import decoder_layers
    from bitassay.quantization.recipe.recipe import BASE
    from bitassay.quantization.replication.controls import with_controls

    if not recipes:
        return [loaded_candidate(model, name) for name, model in zip(names[::-1], models[::-1], strict=True)]
    (base,) = models
    asked = tuple(recipes)
    if controls:
        asked, _ = with_controls(asked, len(decoder_layers(base)))
    return [loaded_candidate(base, BASE), *(quantized_candidate(base, recipe, progress) for recipe in asked)]

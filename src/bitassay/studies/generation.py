"""How far quantized models' own words are from the base model's.
Every model continues the same prompts greedily, one model after the other, and all texts are kept.

Finished batches of texts are parts of the run folder, so that the same command goes on where it was stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitassay.data.corpora import bundled_prompts, prompts_from
from bitassay.engines.arithmetic import Arithmetic
from bitassay.engines.decode import vocabulary_size
from bitassay.engines.engine import TRANSFORMERS
from bitassay.engines.hosted import check_engine
from bitassay.engines.load import load
from bitassay.engines.prompts import encode_prompt
from bitassay.errors import BitassayError, at_least
from bitassay.evaluation.generation import (
    BATCH,
    INTERVAL,
    INTERVALS,
    Text,
    check_scorers,
    compare_texts,
    continuations,
    decoded,
    prefix_lengths,
)
from bitassay.models.identity import Identity, identity
from bitassay.models.options import as_dtype
from bitassay.models.positions import context_length
from bitassay.models.source import resolve
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe, row_names
from bitassay.quantization.runtime.model import check_recipe
from bitassay.record.environment import environment
from bitassay.record.files import check_folder
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, prefixed, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan


@dataclass(frozen=True)
class GenerationPlan(Arithmetic):
    """What is written. recipes: of the base model; candidates: other models with its vocabulary, which
    `engine` runs. prompts: how many of the bundled ones, evenly spaced, or of `prompts_file`."""

    model: str
    recipes: tuple[Recipe, ...] = ()
    candidates: tuple[str, ...] = ()
    engine: str = TRANSFORMERS
    prompts: int = 32
    prompts_file: Path | None = None
    max_new_tokens: int = 64
    batch: int = BATCH

    def __post_init__(self) -> None:
        if len(row_names(self.recipes, self.candidates)) == 1:
            raise BitassayError("nothing to compare the model with", "--recipe w4, or --candidate FOLDER")
        as_dtype(self.dtype)
        if self.engine != TRANSFORMERS:
            if self.recipes:
                raise BitassayError(
                    f"recipes change a model of transformers, and {self.engine} reads files",
                    "candidates that `bitassay quantize` wrote",
                )
            check_engine(self.engine)
        at_least(1, prompts=self.prompts, new_tokens=self.max_new_tokens, batch=self.batch)


def generation(
    model: str,
    recipes: Sequence[str | Path | Recipe] = (),
    *,
    out: Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Let every model write, and compare its texts with the base model's; `options` are fields of
    GenerationPlan. Returns the run (the content of run.json) and its folder.

    Raises BitassayError for bad input, MissingError without the `generation` extra, before any work is done.
    """
    check_scorers()
    plan = GenerationPlan(model, tuple(find_recipe(recipe) for recipe in recipes), **options)

    there = len(bundled_prompts() if plan.prompts_file is None else prompts_from(plan.prompts_file))
    if plan.prompts > there:
        raise BitassayError(
            f"{plan.prompts} prompts were asked for, there are {there}", f"--prompts {there} or fewer"
        )
    check_folder(out)
    for name in plan.candidates:
        check_fit(name, trust_remote_code=trust_remote_code, progress=progress)
    tokens = plan.max_new_tokens + 1
    check_fit(model, plan.recipes, tokens=tokens, trust_remote_code=trust_remote_code, progress=progress)

    loading: dict[str, Any] = {"progress": progress, "trust_remote_code": trust_remote_code}

    def candidate(name: str) -> PreTrainedModel:
        if plan.engine == TRANSFORMERS:
            return plan.loaded(name, **loading)
        return load(name, engine=plan.engine, **loading)

    base = plan.loaded(model, **loading)
    for recipe in plan.recipes:
        check_recipe(base, recipe)
    texts, prompts = _prompts(base, plan)
    model_identity = identity(base)
    work = {
        **_settings(plan),
        "model": model_identity.name,
        "weights_digest": model_identity.weights_digest,
        "config_digest": model_identity.config_digest,
        "candidates_digests": [Identity(resolve(name)).weights_digest for name in plan.candidates],
        "prompts_digest": digest_json(texts),
    }
    folder = open_run_folder(f"generation-{model_identity.name}", run_plan("generation", work), out, progress)

    makers: dict[str, Callable[[], PreTrainedModel]] = {BASE: lambda: base}
    makers |= {r.name: lambda r=r: quantize_cached(base, r, progress=progress) for r in plan.recipes}
    makers |= {name: lambda name=name: _checked(candidate(name), base, name) for name in plan.candidates}
    written = {
        name: _written(folder, f"{number:02d}", make, prompts, plan, prefixed(name, progress))
        for number, (name, make) in enumerate(makers.items())
    }
    rows = [
        {"recipe": name, **compare_texts(outputs, written[BASE]).to_dict()}
        for name, outputs in written.items()
    ]
    run = write_run(
        folder,
        environment=environment(base.device),
        model={
            "name": model_identity.name,
            "origin": model_identity.source.origin,
            "weights_digest": model_identity.weights_digest,
        },
        settings=_settings(plan),
        interval=INTERVAL,
        intervals=INTERVALS,
        prompts=texts,
        texts={
            name: [
                {"text": text.text, "tokens": len(text.ids), "prefix_tokens": prefix, "prefix": shown}
                for text, prefix, shown in _prefixes(base, outputs, written[BASE])
            ]
            for name, outputs in written.items()
        },
        rows=rows,
    )
    return run, folder.path


def _prompts(base: PreTrainedModel, plan: GenerationPlan) -> tuple[list[str], list[tuple[int, ...]]]:
    """Text and token ids of the prompts that leave room for the answer."""
    every = bundled_prompts() if plan.prompts_file is None else prompts_from(plan.prompts_file)
    limit = context_length(base)
    known = [(text, encode_prompt(base, text)) for text in every]
    fit = [pair for pair in known if limit is None or len(pair[1]) + plan.max_new_tokens <= limit]
    if plan.prompts > len(fit):
        raise BitassayError(
            f"{plan.prompts} prompts were asked for, {len(fit)} of {len(every)} leave room for "
            f"{plan.max_new_tokens} tokens in the model's {limit}",
            "fewer --prompts, or fewer --new-tokens",
        )
    chosen = [fit[index * len(fit) // plan.prompts] for index in range(plan.prompts)]
    return [text for text, _ in chosen], [ids for _, ids in chosen]


def _checked(model: PreTrainedModel, base: PreTrainedModel, name: str) -> PreTrainedModel:
    if vocabulary_size(model) != vocabulary_size(base):
        raise BitassayError(
            f"{name} has a vocabulary of {vocabulary_size(model)}, the base model of {vocabulary_size(base)}",
            "compare a model with one that uses the same tokenizer",
        )
    return model


def _written(
    folder: RunFolder,
    key: str,
    make: Callable[[], PreTrainedModel],
    prompts: list[tuple[int, ...]],
    plan: GenerationPlan,
    progress: Progress,
) -> list[Text]:
    """The texts of one model; it is made only where some are not finished."""
    starts = range(0, len(prompts), plan.batch)

    def part(start: int) -> str:
        return f"texts-{key}-{start:05d}"

    kept: list[Text] = []
    for start in starts:
        if not folder.has(part(start)):
            break
        kept += [Text(tuple(saved["ids"]), saved["text"]) for saved in folder.part(part(start), list)]
    if len(kept) < len(prompts):
        done = len(kept)

        def keep(texts: list[Text]) -> None:
            nonlocal done
            folder.part(part(done), lambda: [asdict(text) for text in texts])
            done += len(texts)

        kept += continuations(
            make(),
            prompts,
            max_new_tokens=plan.max_new_tokens,
            batch=plan.batch,
            done=done,
            keep=keep,
            progress=progress,
        )
    return kept


def _prefixes(
    model: PreTrainedModel, texts: Sequence[Text], base: Sequence[Text]
) -> Iterator[tuple[Text, int, str]]:
    """Each text, the tokens that it shares with the base's, and those as text, where they are a beginning of
    it: a token may hold half a letter."""
    for text, length in zip(texts, prefix_lengths(texts, base), strict=True):
        prefix = decoded(model, text.ids[:length])
        yield text, length, prefix if text.text.startswith(prefix) else ""


def _settings(plan: GenerationPlan) -> dict[str, Any]:
    return {
        "recipes": [recipe.model_dump(mode="json") for recipe in plan.recipes],
        "candidates": list(plan.candidates),
        "max_new_tokens": plan.max_new_tokens,
        "batch": plan.batch,
        "dtype": plan.dtype,
        **({} if plan.engine == TRANSFORMERS else {"engine": plan.engine}),
    }

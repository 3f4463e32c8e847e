"""The main job: what each of several recipes costs a model, and whether a verifier notices.

1. evaluate: all recipes against the base model in one pass over the text, in fp32 by default. Recipes with
   copies bring their controls along (`quantization/replication/controls.py`) as rows of their own;
2. bench: real models (packed codes) in bf16, in turn;
3. verify: a profile is fitted to honest bf16 runs of the base model; then each quantized model generates
   while claiming to be the base model, and a verifier that holds the base model checks its traces.

Every step keeps its finished parts in the run folder, so that the same command continues where it stopped.

A new column: put its value into the row here, and add a line to `report/columns.yaml`.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from bitassay.bench.timing import DECODE_TOKENS, throughput
from bitassay.data.corpora import check_corpus
from bitassay.data.windows import NamedProtocol, Protocol
from bitassay.engines.arithmetic import Arithmetic
from bitassay.errors import BitassayError, at_least
from bitassay.evaluation.controls import pair
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import INTERVAL, INTERVALS, score_windows, summarise
from bitassay.models.empty import without_weights
from bitassay.models.identity import identity
from bitassay.models.options import as_dtype
from bitassay.models.positions import context_length, model_windows
from bitassay.models.source import resolve
from bitassay.models.walk import decoder_layers
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.export.plan import OPENED
from bitassay.quantization.pipeline import quantize_tensors_cached
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe, row_names
from bitassay.quantization.replication.controls import Place, with_controls
from bitassay.quantization.runtime.model import (
    Quantization,
    bits_per_weight,
    check_recipe,
    parameter_count,
    quantization_of,
    size_bytes,
    with_tensors,
)
from bitassay.record.environment import environment
from bitassay.record.files import check_folder
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan
from bitassay.studies.memory import chosen_way
from bitassay.studies.verdicts import Verification, chosen_prompts, honest_profile, verdict_columns
from bitassay.verification.profile import Profile

DEFAULT_PROTOCOL = Protocol(windows=16)
DEFAULT_VERIFICATION = Verification()


@dataclass(frozen=True)
class AssayPlan(Arithmetic):
    """What an assay does. `verification` None leaves the verdicts out, `bench_repeats` 0 the timings."""

    model: str
    recipes: tuple[Recipe, ...]
    protocol: NamedProtocol = DEFAULT_PROTOCOL
    seed: int = 0
    bench_repeats: int = 3
    bench_tokens: int = 256
    verification: Verification | None = DEFAULT_VERIFICATION

    def __post_init__(self) -> None:
        if len(row_names(self.recipes)) == 1:
            raise BitassayError("no recipe was given", "--recipe w4, or see `bitassay recipes list`")
        as_dtype(self.dtype)
        at_least(0, repeats=self.bench_repeats, seed=self.seed)
        at_least(1, windows=self.protocol.windows)
        at_least(2, window=self.protocol.window_tokens)
        check_corpus(self.protocol.corpus)

    def with_controls(self, layers: int) -> tuple["AssayPlan", list[Place]]:
        """Return the plan with controls, for a model of so many layers, and which these are."""
        recipes, places = with_controls(self.recipes, layers)
        return replace(self, recipes=recipes), places


def assay(
    model: str,
    recipes: Sequence[str | Path | Recipe],
    *,
    controls: bool = True,
    out: Path | None = None,
    memory: int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Run the whole job; `options` are fields of AssayPlan. Returns the run (the content of run.json) and its
    folder. controls: add those of recipes with copies, and `pairs` of each with them. memory: in bytes (None:
    what is free); where the models do not fit, they are quantized and evaluated a layer at a time.

    Raises BitassayError for bad input before any work is done.
    """
    plan = AssayPlan(model, tuple(find_recipe(recipe) for recipe in recipes), **options)
    tokens = plan.verification.new_tokens if plan.verification else 0
    check_fit(model, plan.recipes, tokens=tokens, trust_remote_code=trust_remote_code, progress=progress)
    check_folder(out)

    empty = without_weights(
        resolve(model, progress), dtype=as_dtype(plan.dtype), trust_remote_code=trust_remote_code
    )
    plan, places = plan.with_controls(len(decoder_layers(empty))) if controls else (plan, [])
    for recipe in plan.recipes:
        check_recipe(empty, recipe)
    steps = bool(plan.bench_repeats), plan.verification is not None
    way, peak = chosen_way(empty, plan.recipes, plan.protocol, memory, *steps)
    progress(f"the models are read {way}, in about {peak / 1e9:.1f} GB of memory")

    loading: dict[str, Any] = {"progress": progress, "trust_remote_code": trust_remote_code}
    base = plan.loaded(model, opened=way == OPENED, **loading)
    windows, corpus_source = model_windows(base, plan.protocol)
    if plan.verification:  # that there are so many short prompts depends on the tokenizer
        chosen_prompts(base, plan.verification.prompts + plan.verification.calibration_prompts, plan.seed)
    model_identity = identity(base)
    work = {
        **plan.to_dict(),
        "model": model_identity.name,
        "weights_digest": model_identity.weights_digest,
        "config_digest": model_identity.config_digest,
        "corpus_source": corpus_source,
    }
    folder = open_run_folder(f"assay-{model_identity.name}", run_plan("assay", work), out, progress)

    stopwatch = _Stopwatch()
    quantizations = {recipe.name: quantize_tensors_cached(base, recipe, progress) for recipe in plan.recipes}
    models = {BASE: base, **{name: with_tensors(base, q, packed=True) for name, q in quantizations.items()}}
    facts = {name: facts_of(model) for name, model in models.items()}
    stopwatch.lap("quantize")
    scores = _evaluate(plan, folder, base, quantizations, windows, progress)
    quality = {name: summarise(scores[name], scores[BASE]).to_dict() for name in models}
    stopwatch.lap("evaluate")
    described = _described(plan, base, corpus_source, windows)
    del base, models  # timing and verification run in bf16

    speed, verification, verdicts = {}, None, {}
    if plan.bench_repeats or plan.verification:
        base = plan.loaded(model, dtype="bfloat16", **loading)
        if plan.bench_repeats:
            room = (context_length(base) or sys.maxsize) - DECODE_TOKENS
            prompt = windows[0, : max(1, min(plan.bench_tokens, room))]
            speed = folder.part("bench", lambda: _bench(plan, base, quantizations, prompt, progress))
            stopwatch.lap("bench")
        if plan.verification:
            verification, verdicts = _verify(
                plan.verification, folder, base, quantizations, plan.seed, progress
            )
            stopwatch.lap("verify")
    rows = [
        facts[name] | quality[name] | speed.get(name, _NO_SPEED) | verdicts.get(name, _NO_VERDICT)
        for name in facts
    ]
    pairs = [pair(place, place.group, scores) for place in places]
    run = write_run(
        folder, **described, verification=verification, rows=rows, pairs=pairs, seconds=stopwatch.laps
    )
    return run, folder.path


_NO_SPEED = {"prefill_tok_s": None, "decode_tok_s": None}
_NO_VERDICT = {"hidden_distance": None, "verdict": None}


class _Stopwatch:
    """Seconds of each step of this invocation (a resumed run has spent more)."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 2), now


def _described(
    plan: AssayPlan, base: PreTrainedModel, corpus_source: str, windows: torch.Tensor
) -> dict[str, Any]:
    """What run.json says of the model, the text and the recipes."""
    model_identity = identity(base)
    return {
        "environment": environment(base.device),
        "model": {
            "name": model_identity.name,
            "origin": model_identity.source.origin,
            "weights_digest": model_identity.weights_digest,
            "tokenizer_digest": model_identity.tokenizer_digest,
            "parameters": parameter_count(base),
            "dtype": plan.dtype,
        },
        "protocol": {
            "id": plan.protocol.id,
            "corpus_source": corpus_source,
            "windows": len(windows),
            "window_tokens": windows.shape[1],
            "predicted_tokens": windows.numel() - len(windows),
            "seed": plan.seed,
            "interval": INTERVAL,
            "intervals": INTERVALS,
        },
        "recipes": {recipe.name: recipe.model_dump(mode="json") for recipe in plan.recipes},
    }


def facts_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the columns of a row that need no run of the model."""
    done = quantization_of(model)
    return {
        "recipe": done.recipe.name if done else BASE,
        "recipe_id": done.recipe.recipe_id if done else None,
        "bits_per_weight": bits_per_weight(model),
        "checkpoint_bits_per_weight": size_bytes(model) * 8 / parameter_count(model),
        "size_bytes": size_bytes(model),
    }


def _evaluate(
    plan: AssayPlan,
    folder: RunFolder,
    base: PreTrainedModel,
    quantizations: dict[str, Quantization],
    windows: torch.Tensor,
    progress: Progress,
) -> dict[str, list[TokenScores]]:
    """Scores by model and window; windows that have a finished part are read, not run again."""
    done = {index for index in range(len(windows)) if folder.has_tensors(_window(index))}
    what, finished = f"evaluating on {plan.protocol.id}", len(done)
    progress(what, finished, len(windows))
    if finished < len(windows):
        # Dense candidates run faster; where memory is short they stay packed.
        weights = sum(t.shape[0] * t.shape[1] for q in quantizations.values() for t in q.tensors.values())
        packed = weights * base.dtype.itemsize > psutil.virtual_memory().available / 2
        candidates = {name: with_tensors(base, q, packed=packed) for name, q in quantizations.items()}
        for index, scores in score_windows(base, candidates, windows, skip=done):
            named = {
                f"{name}/{field}": value for name, s in scores.items() for field, value in s._asdict().items()
            }
            folder.write_tensors(_window(index), named)
            finished += 1
            progress(what, finished, len(windows))
    parts = [folder.read_tensors(_window(index)) for index in range(len(windows))]
    return {
        name: [TokenScores(*(part[f"{name}/{field}"] for field in TokenScores._fields)) for part in parts]
        for name in (BASE, *quantizations)
    }


def _window(index: int) -> str:
    return f"window-{index:04d}"


def _bench(
    plan: AssayPlan,
    base: PreTrainedModel,
    quantizations: dict[str, Quantization],
    prompt: torch.Tensor,
    progress: Progress,
) -> dict[str, Any]:
    models = {BASE: base, **{name: with_tensors(base, q, packed=True) for name, q in quantizations.items()}}
    return throughput(
        {name: (lambda m=m: m) for name, m in models.items()},
        prompt,
        repeats=plan.bench_repeats,
        progress=progress,
    )


def _verify(
    plan: Verification,
    folder: RunFolder,
    base: PreTrainedModel,
    quantizations: dict[str, Quantization],
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the profile is, and the verdict columns of every model, each of which claims to be the base
    model."""
    prompts = chosen_prompts(base, plan.prompts + plan.calibration_prompts, seed)
    proved, calibration = prompts[: plan.prompts], prompts[plan.prompts :]
    try:
        profile = Profile.model_validate(
            folder.part(
                "profile", lambda: honest_profile(plan, base, calibration, progress).model_dump(mode="json")
            )
        )
    except BitassayError as error:
        # The other columns are worth having without a verdict; the reason goes into the run and to the user.
        progress(f"no verdicts: {error}")
        return {"reason": str(error)}, {
            name: _NO_VERDICT | {"verdict": "INCONCLUSIVE"} for name in (BASE, *quantizations)
        }
    columns = {}
    for name in (BASE, *quantizations):
        columns[name] = folder.part(
            f"verdict-{name}",
            lambda name=name: verdict_columns(plan, base, quantizations.get(name), proved, profile, progress),
        )
    held_out = profile.held_out
    described = {
        **asdict(plan),
        "dtype": profile.prover.dtype,
        "layers": sorted(profile.layers),
        "honest_runs_scored": profile.n,
        "held_out_runs": held_out.n,
        "held_out_false_positive_rate": held_out.false_positive_rate,
        "held_out_interval": held_out.interval,
    }
    return described, columns

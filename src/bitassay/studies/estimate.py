"""What an assay will need, before it runs: memory and time.
From the model's configuration and a short timing of this machine.

Time is arithmetic over measured speed: two floating-point operations a parameter and token for prefill; for
decoding, the bytes of the weights over the measured read bandwidth. It leaves out loading and everything else
that is short.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitassay.bench.roofline import matrix_peak, stream_bandwidth
from bitassay.models.empty import without_weights
from bitassay.models.options import as_device, as_dtype
from bitassay.models.source import resolve
from bitassay.models.walk import decoder_layers
from bitassay.quantization.export.plan import OPENED, Plan, plan_export
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.runtime.model import check_recipe, parameter_count
from bitassay.record.progress import Progress, silent
from bitassay.studies.assay import AssayPlan
from bitassay.studies.memory import bench_bytes, chosen_way, verify_bytes

PROMPT_TOKENS = 60  # about the mean of the prompts that are used
BUFFER_BYTES = 2**27  # far larger than the caches


def estimate_assay(
    model: str,
    recipes: Sequence[str | Path | Recipe],
    *,
    controls: bool = True,
    memory: int | None = None,
    progress: Progress = silent,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return rows `step, work, memory_bytes, seconds`. The model is fetched where it is not here yet, but no
    weights are loaded. memory: as of `assay`; raises BitassayError where a step does not fit."""
    plan = AssayPlan(model, tuple(find_recipe(recipe) for recipe in recipes), **options)
    empty = without_weights(resolve(model, progress), dtype=as_dtype(plan.dtype))
    if controls:
        plan, _ = plan.with_controls(len(decoder_layers(empty)))
    for recipe in plan.recipes:
        check_recipe(empty, recipe)
    parameters, models = parameter_count(empty), len(plan.recipes) + 1
    tokens = (plan.protocol.windows or 0) * plan.protocol.window_tokens
    steps = bool(plan.bench_repeats), plan.verification is not None
    way, peak = chosen_way(empty, plan.recipes, plan.protocol, memory, *steps)
    device = as_device(plan.device)
    rate, rate16 = _flops(as_dtype(plan.dtype), device), _flops(torch.bfloat16, device)
    rows: list[dict[str, Any]] = []

    def needs(step: str, work: str, memory_bytes: int, seconds: float) -> None:
        rows.append({"step": step, "work": work, "memory_bytes": memory_bytes, "seconds": seconds})

    for recipe in plan.recipes:
        if recipe.is_calibrated:
            memory_bytes = peak_of(plan_export(empty, recipe), way)
            seconds = _calibration_flops(recipe, parameters) / rate16
            needs(f"quantize {recipe.name}", f"{', '.join(recipe.parts)}; once", memory_bytes, seconds)
    work = f"{models} models x {tokens} tokens, {plan.protocol.id}; read {way}"
    needs("evaluate", work, peak, 2 * parameters * tokens * models / rate)
    decode_s = parameters * 2 / stream_bandwidth(device, BUFFER_BYTES)
    if plan.bench_repeats:
        round_s = 2 * parameters * plan.bench_tokens / rate16 + 12 * decode_s
        work = f"{models} models x {plan.bench_repeats} rounds"
        needs("bench", work, bench_bytes(empty, plan.recipes), round_s * models * plan.bench_repeats)
    if v := plan.verification:
        traces = v.calibration_prompts + v.prompts * models
        prefill = 2 * parameters * (2 * PROMPT_TOKENS + v.new_tokens) * traces / rate16
        seconds = prefill + v.new_tokens * traces * decode_s / 8
        needs("verify", f"{traces} traces of {v.new_tokens} tokens", verify_bytes(empty), seconds)
    return rows


def peak_of(plan: Plan, way: str) -> int:
    """Return the peak of quantizing in bytes, with the model read in that way."""
    return plan.opened_memory_bytes or plan.memory_bytes if way == OPENED else plan.memory_bytes


def _calibration_flops(recipe: Recipe, parameters: int) -> float:
    """Forward passes and the statistics of the inputs, about as much again, over the calibration text; four
    passes' worth for each token that is learned from. Searches of smoothing and mixed bits are left out."""
    text = recipe.text
    passes = 2 * text.samples + sum(part.text_passes(text.samples) for part in recipe.parts.values())
    return 2.0 * parameters * text.tokens * passes


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measured floating-point operations a second of a matrix product of a decoder's size."""
    peak = matrix_peak(str(dtype).removeprefix("torch."), device, (512, 1024, 1024))
    assert peak is not None
    return peak

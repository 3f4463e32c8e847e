"""What a variant stores and what a token costs it.
Bits, bytes of weights that decoding one token reads, floating-point operations, passes of a layer.

    bytes   the codes, scales and all that is stored with a matrix, once a pass that reads them, and the head;
            what is not quantized counts 16 bits a weight, whatever dtype it is computed in
    flop    2 a weight and product; n roundings of one input are n products

Of dynamic passes and any-precision inference, what a text really took is measured with it (`WindowResult`);
the keys and values that a token leaves in the cache for passes that it does not have are not counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.roofline import matrices_of
from bitassay.evaluation.divergence import window_logits
from bitassay.models.walk import decoder_layers
from bitassay.quantization.codes.rounding import generator_for
from bitassay.quantization.recipe.calibration import calibration_tokens
from bitassay.quantization.replication.any_precision import Depth, gated_logits, shuffled, with_any_precision
from bitassay.quantization.replication.select import chosen_layers
from bitassay.quantization.runtime.looped_layers import Usage
from bitassay.quantization.runtime.model import bits_per_weight, cache_slots, quantization_of, size_bytes
from bitassay.record.progress import silent
from bitassay.studies.variants import Reading

COSTS = ("passes", "bytes")


class WindowResult(NamedTuple):
    """What a variant made of a window: the logits at all positions but the last; passes of a layer and, of
    any-precision inference, bytes of weights, both for a token on average."""

    logits: Float[Tensor, "predicted vocabulary"]
    passes: float
    bytes: float | None

    @property
    def costs(self) -> dict[str, Tensor]:
        values = {"passes": self.passes, "bytes": self.bytes}
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items() if v is not None}


def facts_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model stores and what a token costs."""
    done, matrices = quantization_of(model), matrices_of(model, dense_bytes=2)
    tensors = {} if done is None else done.tensors
    weights = matrices.body_weights + matrices.reached * matrices.expert_weights
    return {
        "recipe_id": None if done is None else done.recipe.recipe_id,
        "bits_per_weight": bits_per_weight(model),
        "size_bytes": size_bytes(model),
        "columns": sorted({tensor.shape[1] for tensor in tensors.values()}),
        "bytes_per_token": matrices.token_bytes,
        "flop_per_token": 2 * (_products(model) * weights + matrices.head_weights),
        "head_bytes": matrices.head_bytes,
        "head_flop": 2 * matrices.head_weights,
        "passes": cache_slots(model) / len(decoder_layers(model)),
    }


def with_costs(facts: dict[str, Any], costs: Mapping[str, float]) -> dict[str, Any]:
    """Return facts with what the text really took in the place of what it could take at most."""
    if not facts:
        return facts
    share = costs["passes"] / facts["passes"]

    def took(what: str) -> float:
        head = facts[f"head_{what}"]  # has no passes
        return head + (facts[f"{what}_per_token"] - head) * share

    return facts | {
        "passes": costs["passes"],
        "flop_per_token": took("flop"),
        "bytes_per_token": costs.get("bytes", took("bytes")),
    }


def _products(model: PreTrainedModel) -> int:
    """How many products there are with each matrix in a pass."""
    done = quantization_of(model)
    return 1 if done is None else done.recipe.input_copies


def window_reader(
    base: PreTrainedModel, model: PreTrainedModel, reading: Reading | None
) -> Callable[[Int[Tensor, " tokens"]], WindowResult]:
    """Return the function that runs a variant on a window. `base` is the model before it was quantized."""
    if reading is None:
        return lambda window: _run(model, window)
    deep, reader = with_any_precision(model)
    if reading.layers is not None:
        done = quantization_of(model)
        assert done is not None
        schemes = {name: done.recipe.scheme_for(name) for name in done.tensors}
        by_text = reading.layers.by != "error"
        tokens = calibration_tokens(base, done.recipe.text) if by_text else None
        reader.deep_layers = frozenset(chosen_layers(base, schemes, reading.layers, tokens, silent))

    def run(window: Int[Tensor, " tokens"]) -> WindowResult:
        reader.clear()
        depth: Depth = 1
        if reading.threshold is not None:
            logits, depths = gated_logits(deep, reader, window, reading.threshold)
            if reading.seed is None:
                return WindowResult(logits[:-1], 1.0, reader.bytes_per_token)
            depth = shuffled(depths, generator_for(reading.seed, str(window.tolist())))[None]
            reader.clear()
        with reader.reading(depth):
            logits = window_logits(deep, window)
        return WindowResult(logits, 1.0, reader.bytes_per_token)

    return run


def _run(model: PreTrainedModel, window: Int[Tensor, " tokens"]) -> WindowResult:
    done, layers = quantization_of(model), len(decoder_layers(model))
    plan = None if done is None else done.recipe.replication
    if plan is None or plan.stop is None:
        return WindowResult(window_logits(model, window), cache_slots(model) / layers, None)
    usage: Usage = model.replication_usage  # type: ignore[assignment]
    usage.clear()
    return WindowResult(window_logits(model, window), 1 + usage.passes_per_token / layers, None)

"""Carry out a recipe's `replication` on a model: `copies_by_layer`, `with_copies`, `add_passes`.

Quantizing calls the first two: which layers get how many copies, then the codes of the copies and the
coefficients of the passes, both of which become part of the `Quantization`. Whoever builds a model from a
`Quantization`, fake, packed or reloaded, calls `add_passes`, which gives the layers their passes.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantize.model import Quantization
from bitassay.quantize.recipe import Recipe
from bitassay.record.progress import Progress
from bitassay.replicate.passes import Passes, Usage


def copies_by_layer(
    model: PreTrainedModel, recipe: Recipe, tokens: Int[Tensor, "samples tokens"] | None, progress: Progress
) -> dict[int, int]:
    """How many copies each layer gets that gets several. `model` is about to be quantized by `recipe`."""
    plan = recipe.replication
    assert plan is not None
    counts = plan.known_counts(len(decoder_layers(model)))
    assert counts is not None
    return counts


def with_copies(
    base: PreTrainedModel,
    made: Quantization,
    weights: Mapping[str, Float[Tensor, "_ _"]],
    counts: Mapping[int, int],
    tokens: Int[Tensor, "samples tokens"] | None,
    progress: Progress,
) -> Quantization:
    """`made`, with the passes of the layers in `counts`."""
    plan = made.recipe.replication
    assert plan is not None
    return replace(made, passes={index: plan.steps(count) for index, count in counts.items()})


def add_passes(model: PreTrainedModel, quantization: Quantization) -> None:
    """Give the layers of a model, in place, the passes that `quantization` says. Everything else about the model
    must be as it will be: copies of a layer take over its hooks. Raises BitassayError for layers whose keys and
    values cannot have several slots."""
    plan, layers, usage = quantization.recipe.replication, decoder_layers(model), Usage()
    assert plan is not None
    slot, added = len(layers), []
    for index, steps in sorted(quantization.passes.items()):
        layer = layers[index]
        if not hasattr(layer, "self_attn"):
            raise BitassayError(
                f"{type(model).__name__}: layer {index} has no self_attn, so its cache has no place for copies",
                "replication: {of: linear}, or other layers",
            )
        modules = [layer] * steps.count
        passes = Passes(modules, steps, first_slot=slot, how=plan.how, stop=plan.stop, usage=usage)
        layer.forward = passes
        added.append(passes)
        slot += steps.count - 1
    added[0].begins = added[-1].ends = True
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(model, "replication_usage", usage)

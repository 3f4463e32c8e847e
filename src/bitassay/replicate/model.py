"""Carry out a recipe's `replication`: `copies_by_layer`, `with_copies`, `add_passes`.

Quantizing calls the first two: which layers get how many copies, then the codes of the copies and the
coefficients of the passes, both of which become part of the `Quantization`. Whoever builds a model from
a `Quantization`, fake, packed or reloaded, calls `add_passes`, which gives the layers their passes.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, matrices, module_name, walk
from bitassay.quantize.linear import QuantizedLinear, RoundedInputLinear
from bitassay.quantize.model import Quantization, with_tensors
from bitassay.quantize.replication import REPLICAS, ReplicationPlan, Steps, replica_names
from bitassay.quantize.scheme import WeightScheme
from bitassay.quantize.tensor import QuantizedTensor, quantize_tensor
from bitassay.record.progress import Progress
from bitassay.replicate.fit import fit_passes
from bitassay.replicate.passes import Passes, Usage
from bitassay.replicate.select import chosen_layers


def copies_by_layer(
    model: PreTrainedModel,
    plan: ReplicationPlan,
    schemes: Mapping[str, WeightScheme | None],
    tokens: Int[Tensor, "samples tokens"] | None,
    progress: Progress,
) -> dict[int, int]:
    """How many copies each layer gets that gets several. `model` is about to be quantized by `schemes`."""
    counts = plan.known_counts(len(decoder_layers(model)))
    if counts is not None:
        return counts
    assert not isinstance(plan.layers, (str, tuple, dict))
    chosen = chosen_layers(model, schemes, plan.layers, tokens, progress)
    progress(f"layers with copies, by {plan.layers.by}: {', '.join(map(str, chosen))}")
    return dict.fromkeys(chosen, plan.copies) if plan.copies > 1 else {}


def with_copies(
    base: PreTrainedModel,
    made: Quantization,
    before: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    counts: Mapping[int, int],
    tokens: Int[Tensor, "samples tokens"] | None,
    progress: Progress,
) -> Quantization:
    """`made` with the codes of layers' copies and the coefficients of their passes. `before` is the model as
    it was when its matrices were quantized; `schemes` are those of the recipe."""
    plan = made.recipe.replication
    assert plan is not None
    if not plan.at_run_time:
        return made
    tensors = dict(made.tensors)
    if plan.makes_codes:
        tensors |= _codes_of_copies(before, plan, schemes, counts, progress)
    known = plan.coefficients != "fitted"
    passes = {
        index: plan.steps(count) if known else Steps((1.0,) * count, (1.0,) * count)
        for index, count in counts.items()
    }
    made = replace(made, tensors=tensors, passes=passes)
    if known:
        return made
    assert tokens is not None
    return replace(made, passes=fit_passes(with_tensors(base, made), before, tokens, progress))


def _codes_of_copies(
    before: PreTrainedModel,
    plan: ReplicationPlan,
    schemes: Mapping[str, WeightScheme | None],
    counts: Mapping[int, int],
    progress: Progress,
) -> dict[str, QuantizedTensor]:
    """The matrices of all copies but the layers themselves."""
    linears, weights, tensors = walk(before).linears, matrices(before), {}
    for done, (index, count) in enumerate(counts.items()):
        progress("quantizing copies", done, len(counts))
        copies = plan.of_matrices(count)
        for name, scheme in schemes.items():
            for number, replica in enumerate(replica_names(before, index, name, count), start=1):
                if scheme is None:
                    continue
                if name not in linears:
                    raise BitassayError(
                        f"{name}: copies of fused experts with codes of their own are not made",
                        "replication: {of: linear}, or copies that differ by nothing",
                    )
                tensors[replica] = quantize_tensor(weights[name], copies.scheme(scheme, number), replica)
    return tensors


def add_passes(model: PreTrainedModel, quantization: Quantization) -> None:
    """Give the layers of a model, in place, the passes that `quantization` says. Everything else about the
    model must be as it will be: a copy of a layer takes over its hooks.

    Raises BitassayError for layers whose keys and values cannot have several slots.
    """
    plan, layers, usage = quantization.recipe.replication, decoder_layers(model), Usage()
    assert plan is not None
    slot, added = len(layers), []
    for index, steps in sorted(quantization.passes.items()):
        layer = layers[index]
        if not hasattr(layer, "self_attn"):
            raise BitassayError(
                f"{type(model).__name__}: layer {index} has no self_attn, so no cache has a place for copies",
                "replication: {of: linear}, or other layers",
            )
        if plan.makes_codes or plan.differ == "inputs":
            replicas = _replicas(layer, module_name(model, layer), steps.count, plan, quantization)
            layer.add_module(REPLICAS, nn.ModuleList(replicas))
            modules = [layer, *replicas]
        else:
            modules = [layer] * steps.count
        passes = Passes(modules, steps, first_slot=slot, how=plan.how, stop=plan.stop, usage=usage)
        layer.forward = passes
        added.append(passes)
        slot += steps.count - 1
    added[0].begins = added[-1].ends = True
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(model, "replication_usage", usage)


def _replicas(
    layer: nn.Module, name: str, count: int, plan: ReplicationPlan, quantization: Quantization
) -> list[nn.Module]:
    """Copies of a layer that share all that does not differ."""
    shared = {id(item): item for item in (*layer.parameters(), *layer.buffers())}
    codes = [module.quantized for module in layer.modules() if isinstance(module, QuantizedLinear)]
    shared |= {id(tensor): tensor for tensor in codes}
    replicas = [copy.deepcopy(layer, dict(shared)) for _ in range(count - 1)]
    for number, replica in enumerate(replicas, start=1):
        for own, module in replica.named_modules():
            tensor = quantization.tensors.get(f"{name}.{REPLICAS}.{number - 1}.{own}")
            if tensor is not None:
                _put(module, tensor)
    if plan.differ == "inputs":
        for number, one in enumerate((layer, *replicas)):
            for module in one.modules():
                if isinstance(module, (QuantizedLinear, RoundedInputLinear)) and module.inputs is not None:
                    module.inputs = replace(module.inputs, copies=count, copy=number)
    return replicas


def _put(module: nn.Module, tensor: QuantizedTensor) -> None:
    """Give a linear other codes: as they are where it holds codes, else dequantized."""
    if isinstance(module, QuantizedLinear):
        module.quantized = tensor
    else:
        dtype = module.get_parameter("weight").dtype
        module.register_parameter("weight", nn.Parameter(tensor.dequantize().to(dtype), requires_grad=False))

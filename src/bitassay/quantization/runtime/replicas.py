"""Give a model the copies of its layers that its recipe says: `add_passes`."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.opened import reading_forward
from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.replication import ReplicationPlan, Steps
from bitassay.quantization.runtime.linear import QuantizedLinear, RoundedInputLinear
from bitassay.quantization.runtime.looped_layers import LoopedForward, Usage, passed_on

# The name of a layer's copies among its modules: `model.layers.3.replicas.0.mlp.down_proj` is of the second.
REPLICAS = "replicas"


def is_replica(name: str) -> bool:
    """Return whether a module or parameter belongs to a copy of a layer."""
    return f".{REPLICAS}." in name


def replica_names(model: PreTrainedModel, layer: int, name: str, count: int) -> list[str]:
    """Return what a layer's matrix is called in each of its `count` - 1 copies; of another layer, nothing."""
    prefix = f"{module_name(model, decoder_layers(model))}.{layer}."
    if not name.startswith(prefix):
        return []
    return [f"{prefix}{REPLICAS}.{copy}.{name.removeprefix(prefix)}" for copy in range(count - 1)]


def original(name: str) -> str:
    """Return the module or parameter that this one is a copy of; itself, where it is none."""
    return re.sub(rf"\.{REPLICAS}\.\d+\.", ".", name)


def add_passes(
    model: PreTrainedModel,
    plan: ReplicationPlan,
    steps_of: Mapping[int, Steps],
    tensors: Mapping[str, QuantizedTensor],
) -> None:
    """Give the layers of a model, in place, their passes; `tensors` has the codes of copies that differ. All
    else must be as it will be: a copy of a layer takes over its hooks. Raises BitassayError for layers whose
    keys and values cannot have several slots."""
    layers, usage = decoder_layers(model), Usage()
    slot, added = len(layers), []
    block = []
    if plan.of == "block":
        block = [reading_forward(model, layers[index]) for index in sorted(steps_of)]
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["all"] * len(layers)
    if block and len({kinds[index] for index in steps_of}) > 1:
        raise BitassayError(
            f"{type(model).__name__}: the layers of the block attend in different ways", "of: layer"
        )
    for index, steps in sorted(steps_of.items()):
        layer = layers[index]
        if not hasattr(layer, "self_attn"):
            raise BitassayError(
                f"{type(model).__name__}: layer {index} has no self_attn, so no cache has a place for copies",
                "replication: {of: linear}, or other layers",
            )
        if plan.of == "block" and added:
            layer.forward = passed_on
            continue
        if plan.makes_codes or plan.differ == "inputs":
            replicas = _replicas(layer, module_name(model, layer), steps.count, plan, tensors)
            layer.add_module(REPLICAS, nn.ModuleList(replicas))
            runs = [[copied.forward] for copied in (layer, *replicas)]
        else:
            runs = [block or [layer.forward]] * steps.count
        passes = LoopedForward(runs, steps, first_slot=slot, how=plan.how, stop=plan.stop, usage=usage)
        layer.forward = passes
        added.append(passes)
        slot += steps.count - 1
    added[0].begins = added[-1].ends = True
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(model, "replication_usage", usage)


def _replicas(
    layer: nn.Module, name: str, count: int, plan: ReplicationPlan, tensors: Mapping[str, QuantizedTensor]
) -> list[nn.Module]:
    shared = {id(item): item for item in (*layer.parameters(), *layer.buffers())}
    codes = [module.quantized for module in layer.modules() if isinstance(module, QuantizedLinear)]
    shared |= {id(tensor): tensor for tensor in codes}
    replicas = [copy.deepcopy(layer, dict(shared)) for _ in range(count - 1)]
    for number, replica in enumerate(replicas, start=1):
        for path, module in replica.named_modules():
            tensor = tensors.get(f"{name}.{REPLICAS}.{number - 1}.{path}")
            if tensor is not None:
                _put(module, tensor)
    if plan.differ == "inputs":
        for number, copied in enumerate((layer, *replicas)):
            for module in copied.modules():
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

"""Where a causal LM keeps its weights: decoder layers, their linears, fused experts, and whatever else is
there.

transformers 5 stores the experts of a mixture as 3-D parameters, not as `nn.Linear`; a walk over linears
alone would skip most of such a model without a word. `walk` therefore sorts *every* matrix of the decoder
layers into a bin.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError


@dataclass(frozen=True)
class Walk:
    """Matrices inside the decoder layers, by full name.

    linears: `nn.Linear` modules. experts: fused expert parameters `[experts, ...]`. routers: matrices that
    choose experts, or weigh a shared one. others: anything else with two or more dimensions, which nothing
    here knows how to treat.
    """

    linears: dict[str, nn.Linear]
    experts: dict[str, nn.Parameter]
    routers: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order. Raises BitassayError for an architecture that keeps none where
    transformers' own do."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise BitassayError(
            f"{type(model).__name__}: found no decoder layers under {type(decoder).__name__}.layers",
            "use a decoder-only model such as Llama, Qwen, Gemma or Mistral",
        )
    return layers


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def walk(model: PreTrainedModel) -> Walk:
    """Sort every matrix of the decoder layers; names are as in `model.named_modules()` and
    `model.named_parameters()`."""
    prefix = module_name(model, decoder_layers(model))
    found = Walk({}, {}, {}, {})
    for name, module in decoder_layers(model).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            if _steers_experts(model, name):
                found.routers[f"{name}.weight"] = module.get_parameter("weight")
            else:
                found.linears[name] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.ndim >= 3 and "expert" in (name + type(module).__name__).lower():
                found.experts[full] = parameter
            elif parameter.ndim == 2 and "router" in type(module).__name__.lower():
                found.routers[full] = parameter
            elif parameter.ndim >= 2:
                found.others[full] = parameter
    return found


def _steers_experts(model: nn.Module, linear: str) -> bool:
    """Whether a linear is a gate beside the experts, such as Qwen2-MoE's `shared_expert_gate` with its one
    output or a router that is a plain linear. Too small to be worth fewer bits, and an error in it changes
    which expert answers, so no recipe touches it."""
    parent, _, own = linear.rpartition(".")
    beside_experts = hasattr(model.get_submodule(parent), "experts")
    return beside_experts and own.endswith(("gate", "router"))

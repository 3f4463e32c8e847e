"""Where a causal LM keeps its weights: decoder layers, their linears, fused experts, and whatever else is
there.

transformers 5 stores the experts of a mixture as 3-D parameters, not as `nn.Linear`; a walk over linears
alone would skip most of such a model without a word. `walk` therefore sorts *every* matrix of the decoder
layers into a bin, and `matrices` gives what can be quantized as `[out, in]` views under one name each.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError


@dataclass(frozen=True)
class Walk:
    """Matrices inside the decoder layers, by full name.

    linears: `nn.Linear` modules. experts: fused expert parameters, `[experts, out, in]` or, where their
    module says `is_transposed`, `[experts, in, out]`. routers: matrices that choose experts, or weigh a
    shared one. others: anything else with two or more dimensions, which nothing here knows how to treat.
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
            if is_fused_experts(module) and parameter.ndim == 3:
                found.experts[full] = parameter
            elif is_fused_experts(module) and key.endswith("_bias"):
                continue  # a vector for each expert
            elif parameter.ndim == 2 and "router" in type(module).__name__.lower():
                found.routers[full] = parameter
            elif parameter.ndim >= 2:
                found.others[full] = parameter
    return found


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module keeps its experts as transformers' fused ones do, and says in which orientation. A
    norm after each expert is not known here, so such a module is none."""
    return hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", True)


def fused_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of fused experts in the decoder layers, by full name."""
    prefix = module_name(model, decoder_layers(model))
    named = decoder_layers(model).named_modules(prefix=prefix)
    return {name: module for name, module in named if is_fused_experts(module)}


def matrices(model: PreTrainedModel) -> dict[str, Float[Tensor, "_ _"]]:
    """Every matrix that can be quantized, as a view `[out, in]` of the model's own memory: linears by module
    name, the slice of each expert as `<parameter>.<expert>`."""
    found = walk(model)
    views = {name: linear.weight.detach() for name, linear in found.linears.items()}
    for name, parameter in found.experts.items():
        transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
        for expert, matrix in enumerate(parameter.detach()):
            views[f"{name}.{expert}"] = matrix.T if transposed else matrix
    return views


def _steers_experts(model: nn.Module, linear: str) -> bool:
    """Whether a linear is a gate beside the experts, such as Qwen2-MoE's `shared_expert_gate` with its one
    output or a router that is a plain linear. Too small to be worth fewer bits, and an error in it changes
    which expert answers, so no recipe touches it."""
    parent, _, own = linear.rpartition(".")
    beside_experts = hasattr(model.get_submodule(parent), "experts")
    return beside_experts and own.endswith(("gate", "router"))

"""Where a causal LM keeps its weights: decoder layers, their linears, fused experts, and the rest.

transformers 5 stores the experts of a mixture as 3-D parameters, not as `nn.Linear`; a walk over linears
alone would skip most of such a model without a word. `walk` therefore sorts *every* matrix of the decoder
layers into a bin, and `matrices` gives what can be quantized as `[out, in]` views under one name each.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError

DECAYS = ("A_log", "D")  # of state space models, in Mamba's names


@dataclass(frozen=True)
class Walk:
    """Matrices inside the decoder layers, by full name.

    linears: `nn.Linear` modules. experts: fused expert parameters, `[experts, out, in]` or, where their
    module says `is_transposed`, `[experts, in, out]`. routers: matrices that choose experts, or weigh a
    shared one. constants: what is no matrix of a product, such as filters of convolutions and the decay of
    a recurrence; no recipe touches it. others: anything else with two or more dimensions, which nothing here
    knows how to treat.
    """

    linears: dict[str, nn.Linear]
    experts: dict[str, nn.Parameter]
    routers: dict[str, nn.Parameter]
    constants: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers, in order. Raises BitassayError where there is no single list of them."""
    # Some classes have an output head by the name under which transformers looks for the decoder.
    lists = _lists_of_blocks(model.get_decoder()) or _lists_of_blocks(model)
    if lists:
        # Towers of images or audio, and what belongs to them, lie deeper than the text's own layers.
        outermost = min(name.count(".") for name in lists)
        lists = {name: part for name, part in lists.items() if name.count(".") == outermost}
    if len(lists) != 1:
        raise BitassayError(
            f"{type(model).__name__}: found "
            + (f"several lists of layers ({', '.join(lists)})" if lists else "no decoder layers"),
            "use a decoder whose layers follow each other, such as Llama, Qwen, Gemma, GPT-2 or Mamba",
        )
    return next(iter(lists.values()))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost model around `decoder_layers` that has the embedding too."""
    layers, embedding = decoder_layers(model), model.get_input_embeddings()
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and {layers, embedding} <= set(module.modules())
    ]
    return around[-1]  # outer modules come first


def _lists_of_blocks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules that are made of several, such as attention and MLP."""
    lists: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if len(part) and all(any([*child.children()] for child in block.children()) for block in part):
            lists[name] = part
    return lists


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """Return the name of a module of `model`."""
    return next(name for name, module in model.named_modules() if module is wanted)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is: layers may share a module."""
    for name in [name for name, part in model.named_modules(remove_duplicate=False) if part is old]:
        model.set_submodule(name, new, strict=True)


def walk(model: PreTrainedModel) -> Walk:
    """Sort every matrix of the decoder layers, by the names that it has in the model."""
    prefix = module_name(model, decoder_layers(model))
    bins = Walk({}, {}, {}, {}, {})
    for name, module in decoder_layers(model).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            if _steers_experts(model, name):
                bins.routers[f"{name}.weight"] = module.get_parameter("weight")
            else:
                bins.linears[name] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if is_fused_experts(module) and parameter.ndim == 3:
                bins.experts[full] = parameter
            elif parameter.ndim == 2 and "router" in type(module).__name__.lower():
                bins.routers[full] = parameter
            elif parameter.ndim >= 2 and _is_constant(module, key, parameter):
                bins.constants[full] = parameter
            elif parameter.ndim >= 2:
                bins.others[full] = parameter
    return bins


def _is_constant(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a filter, a bias for each head, a decay, or a vector in more dimensions."""
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return convolves or key.endswith("bias") or key in DECAYS or parameter.numel() == max(parameter.shape)


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module keeps its experts as transformers' fused ones do, and says in which
    orientation. A norm after each expert is not known here, so such a module is none."""
    return hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", True)


def fused_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of fused experts in the decoder layers, by full name."""
    prefix = module_name(model, decoder_layers(model))
    named = decoder_layers(model).named_modules(prefix=prefix)
    return {name: module for name, module in named if is_fused_experts(module)}


def matrices(model: PreTrainedModel) -> dict[str, Float[Tensor, "_ _"]]:
    """Return every matrix that can be quantized, as a view `[out, in]` of the model's own memory: linears by
    module name, the slice of each expert as `<parameter>.<expert>`."""
    bins = walk(model)
    views = {name: linear.weight.detach() for name, linear in bins.linears.items()}
    for name, parameter in bins.experts.items():
        transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
        for expert, matrix in enumerate(parameter.detach()):
            views[f"{name}.{expert}"] = matrix.T if transposed else matrix
    return views


def _steers_experts(model: nn.Module, linear: str) -> bool:
    """Whether a linear is a gate beside the experts, such as Qwen2-MoE's `shared_expert_gate` with its one
    output or a router that is a plain linear. Too small to be worth fewer bits, and an error in it changes
    which expert answers, so no recipe touches it."""
    parent, _, name = linear.rpartition(".")
    beside_experts = hasattr(model.get_submodule(parent), "experts")
    return beside_experts and name.endswith(("gate", "router"))

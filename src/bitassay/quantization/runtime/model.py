"""A quantized model around quantized matrices.

It is a transformers model still. A *fake* quantized model holds the dequantized weights, so that everything
transformers can do works and runs at full speed; a *real* one (`packed=True`) holds the packed codes. Both
give the same logits. Parameters that the recipe leaves alone (embeddings, norms, the head) are shared with
the base model, not copied.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError, suggestion
from bitassay.models.config import untie
from bitassay.models.identity import Identity, attach
from bitassay.models.opened import weights_of
from bitassay.models.opened_weights import Weights
from bitassay.models.walk import decoder_layers, matrices, module_name, replace_module, walk
from bitassay.models.weights import stored_bits
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.inputs.kv_cache import round_cache
from bitassay.quantization.recipe.calibration import check_calibration
from bitassay.quantization.recipe.formats import RUN
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import ReplicationPlan, Steps
from bitassay.quantization.recipe.rows import changes, fitted
from bitassay.quantization.recipe.transforms import Smoothing
from bitassay.quantization.runtime.experts import put_experts, with_slices
from bitassay.quantization.runtime.linear import QuantizedLinear, RoundedInputLinear
from bitassay.quantization.runtime.replicas import add_passes, is_replica
from bitassay.quantization.transforms.folding import INPUT_SCALES, divide_inputs
from bitassay.quantization.transforms.rotation import add_online

# What in a part of a recipe needs all layers of a model at once, by its name; "" where a layer at a time will
# do. Of other parts nobody knows.
WHOLE_MODEL: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("rotation", "smoothing", "gptq", "low_rank", "learned", "tune"), lambda _: ""),
    **dict.fromkeys(("activations", "kv_cache"), lambda _: ""),
    "replication": lambda plan: f"replication {why}" if (why := plan.needs_all_layers) else "",
}


@dataclass(frozen=True)
class Quantization:
    """What was done to a model: the recipe, the quantized matrices by their names in `matrices(model)`, the
    new dense values of other parameters that the recipe changed, by full name, how the inputs of linears are
    rounded, by theirs, and the passes of each layer that has several; codes of a layer's copies are among the
    tensors, by the names that they have in the replicated model."""

    recipe: Recipe
    tensors: Mapping[str, QuantizedTensor]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, InputRounding] = field(default_factory=dict)
    passes: dict[int, Steps] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Quantization":
        """Return the same with its tensors on that device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        parameters = {name: value.to(device) for name, value in self.parameters.items()}
        return replace(self, tensors=tensors, parameters=parameters)


def with_tensors(
    base: PreTrainedModel, quantization: Quantization, *, packed: bool = False
) -> PreTrainedModel:
    """Return a copy of `base` with what `quantization` changed; everything else is shared."""
    model = copy_sharing_parameters(base)
    if (weights := weights_of(model)) is not None:
        return _with_changes(base, model, weights, quantization)
    quantization = quantization.to(base.device)
    for name, value in quantization.parameters.items():
        if not name.endswith(f".{INPUT_SCALES}"):
            _replace_parameter(model, name, value)
    linears = walk(model).linears
    slices = {
        name: tensor
        for name, tensor in quantization.tensors.items()
        if name not in linears and not is_replica(name)
    }
    put_experts(model, slices, packed)
    for name, linear in linears.items():
        tensor, inputs = quantization.tensors.get(name), quantization.inputs.get(name)
        if tensor is not None and packed:
            packed_linear = QuantizedLinear(tensor, linear.bias, linear.weight.dtype, inputs)
            replace_module(model, linear, packed_linear)
            continue
        if tensor is not None:
            linear.weight = nn.Parameter(tensor.dequantize().to(linear.weight.dtype), requires_grad=False)
        if inputs is not None:
            replace_module(model, linear, RoundedInputLinear(linear, inputs))
    return _finished(base, model, quantization)


def _with_changes(
    base: PreTrainedModel, model: PreTrainedModel, weights: Weights, quantization: Quantization
) -> PreTrainedModel:
    """Say how the weights of an opened model are made, when they are needed; there, codes are never held."""
    linears, tensors, dtype = walk(model).linears, quantization.tensors, model.dtype
    parameters, head = quantization.parameters, model.get_output_embeddings()
    for name in parameters:
        if name in weights.empty:
            weights.changes[name] = lambda _, name=name: parameters[name].to(weights.device, dtype)
    if head is not None and (own := f"{module_name(model, head)}.weight") in parameters:
        untie(model)
        weights.separate(own)
    for name in tensors:
        if name in linears:
            weights.changes[f"{name}.weight"] = lambda _, name=name: tensors[name].dequantize().to(dtype)
            if (inputs := quantization.inputs.get(name)) is not None:
                replace_module(model, linears[name], RoundedInputLinear(linears[name], inputs))
    decode_experts(model, weights, tensors, [name for name in tensors if name not in linears])
    return _finished(base, model, quantization)


def decode_experts(
    model: PreTrainedModel, weights: Weights, tensors: Mapping[str, QuantizedTensor], names: Collection[str]
) -> None:
    """Say that these slices of an opened model's experts are what their codes stand for."""
    slices: dict[str, list[str]] = {}
    for name in names:
        slices.setdefault(name.rpartition(".")[0], []).append(name)
    for parameter, own in slices.items():
        experts, codes = model.get_submodule(parameter.rpartition(".")[0]), partial(_picked, tensors, own)
        weights.changes[parameter] = partial(with_slices, experts, codes)


def _picked(tensors: Mapping[str, QuantizedTensor], names: list[str]) -> dict[int, QuantizedTensor]:
    return {int(name.rpartition(".")[2]): tensors[name] for name in names}


def _finished(base: PreTrainedModel, model: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    for attach_part, part in quantization.recipe.steps(ATTACH):
        attach_part(model, part, quantization)
    attach(model, quantization=quantization)
    if isinstance(known := getattr(base, "identity", None), Identity):
        recipe = quantization.recipe
        attach(model, identity=known.with_recipe(recipe.recipe_id, recipe.name))
    return model


def _add_input_scales(model: PreTrainedModel, smoothing: Smoothing, quantization: Quantization) -> None:
    for name in quantization.parameters:
        if name.endswith(f".{INPUT_SCALES}"):
            linear = model.get_submodule(name.removesuffix(f".{INPUT_SCALES}"))
            divide_inputs(linear, quantization.parameters[name].to(model.device, model.dtype))


def _add_passes(model: PreTrainedModel, plan: ReplicationPlan, quantization: Quantization) -> None:
    if quantization.passes:
        add_passes(model, plan, quantization.passes, quantization.tensors)


# What a part of a recipe adds to a model that runs, by its name; last come passes, which take hooks over.
ATTACH: dict[str, Callable[[PreTrainedModel, Any, Quantization], None]] = {
    "rotation": lambda model, rotation, _: add_online(model, rotation),
    "smoothing": _add_input_scales,
    "kv_cache": lambda model, spec, _: round_cache(model, spec),
    "replication": _add_passes,
}


def quantization_of(model: PreTrainedModel) -> Quantization | None:
    """Return what `quantize` did to a model; None for one that was not quantized here."""
    return getattr(model, "quantization", None)


def cache_slots(model: PreTrainedModel) -> int:
    """Return how many keys and values a token has in a cache: one a layer and pass."""
    passes = done.passes if (done := quantization_of(model)) else {}
    return len(decoder_layers(model)) + sum(steps.count - 1 for steps in passes.values())


def check_recipe(model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Return the model's `matrices`. Raises BitassayError where an override of the recipe matches nothing,
    where it would quantize a matrix of a kind that cannot be, or where the calibration samples are longer
    than what the model reads."""
    if recipe.is_calibrated:
        check_calibration(model, recipe.text)
    modules, views = walk(model), matrices(model)
    columns = {name: view.shape[1] for name, view in views.items()}
    odd = [name for name, count in columns.items() if count % RUN and recipe.override_for(name) is None]
    for scheme in recipe.choices:
        if scheme.number_format.levels and odd:
            raise BitassayError(
                f"recipe {recipe.name}: mixed may choose {scheme.format}, which rows of "
                f"{columns[odd[0]]} weights ({odd[0]}) cannot have: {RUN} does not divide them",
                f"an override for *.{odd[0].rpartition('.')[2]}, or other formats",
            )
    names = [*views, *modules.others]
    routers = sorted({name.removesuffix(".weight") for name in modules.routers} | set(modules.routers))
    for override in recipe.overrides:
        if any(recipe.override_for(name) is override for name in names):
            continue
        what = f"recipe {recipe.name}: the override {override.match!r}"
        if named := [name for name in routers if recipe.override_for(name) is override]:
            raise BitassayError(
                f"{what} names a router, {named[0]}: "
                "routers stay in high precision, since an error in one changes which expert answers",
                "remove the override; nothing else matches it",
            )
        raise BitassayError(
            f"{what} applies to no module of {type(model).__name__}; "
            f"{suggestion(override.match, _patterns(names))}",
            "match full names with a glob, such as '*.down_proj' or 'model.layers.0.*'; the first match wins",
        )
    skipped = [name for name in modules.others if recipe.scheme_for(name) is not None]
    if skipped:
        pattern = "*.experts.*" if ".experts." in skipped[0] else f"*.{skipped[0].rpartition('.')[2]}"
        raise BitassayError(
            f"{type(model).__name__} has matrices of a kind that this version cannot quantize, such as "
            f"{skipped[0]}",
            f"leave them in high precision with an override: {{match: '{pattern}', weights: null}}",
        )
    return views


def fitted_to(model: PreTrainedModel, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with formats that the rows of the model's matrices can have (`recipe/rows.py`), and a
    line for each kind of change."""
    columns = {name: view.shape[1] for name, view in matrices(model).items()}
    changed = fitted(recipe, columns)
    return changed, changes(recipe, changed, columns)


def obstacle_to_opening(recipe: Recipe) -> str | None:
    """Return the part of a recipe that needs all layers of a model at once; None where none does."""
    known = (WHOLE_MODEL[name](part) if name in WHOLE_MODEL else name for name, part in recipe.parts.items())
    return next(filter(None, known), None)


def check_opening(recipe: Recipe) -> None:
    """Raise BitassayError for a recipe that cannot be followed a layer at a time."""
    if part := obstacle_to_opening(recipe):
        raise BitassayError(
            f"{recipe.name}: {part} needs the whole model in memory, and it does not fit",
            "more --memory, or a recipe without it",
        )


def bits_per_weight(model: PreTrainedModel) -> float:
    """Return the average bits of a quantized weight, scales, zero points and the codes of all its copies
    included, also of a checkpoint that others quantized; 16 for an unquantized model."""
    bits, weights = _quantized(model)
    return bits / weights if weights else 16.0


def size_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the whole checkpoint: packed matrices, all other parameters at 16 bits."""
    bits, weights = _quantized(model)
    return (parameter_count(model) - weights) * 2 + bits // 8


def parameter_count(model: PreTrainedModel) -> int:
    """Return the number of parameters of the dense model, tied ones once, whether fake or packed."""
    tensors = done.tensors if (done := quantization_of(model)) else {}
    dense = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        for held in (f"{name}.weight", name.rpartition(".")[0]):  # of a linear, of an expert
            if held in dense:
                dense[held] -= tensor.shape[0] * tensor.shape[1]
    return sum(dense.values()) + quantized_weights(tensors)


def quantized_weights(tensors: Mapping[str, QuantizedTensor]) -> int:
    """Return how many weights of the dense model they hold; a layer's copies hold the same ones again."""
    return sum(t.shape[0] * t.shape[1] for name, t in tensors.items() if not is_replica(name))


def _quantized(model: PreTrainedModel) -> tuple[int, int]:
    if done := quantization_of(model):
        return sum(t.stored_bits for t in done.tensors.values()), quantized_weights(done.tensors)
    known = getattr(model, "identity", None)
    if not isinstance(known, Identity):
        return 0, 0
    # Another program's codes: linears of which the files hold something else than a plain weight.
    bits = stored_bits(known.source.folder)
    linears = {name: linear for name, linear in walk(model).linears.items() if name in bits}
    weights = sum(linear.in_features * linear.out_features for linear in linears.values())
    return sum(bits[name] for name in linears), weights


def copy_sharing_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with its own modules around the same parameters, tokenizer and identity."""
    attached = [getattr(model, name) for name in ("tokenizer", "identity") if hasattr(model, name)]
    return copy.deepcopy(
        model, {id(item): item for item in (*model.parameters(), *model.buffers(), *attached)}
    )


def _replace_parameter(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Give `model` alone a new value, in the dtype of the old one; an output head is untied by it."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module.get_parameter(key)
    module.register_parameter(key, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
    if module is model.get_output_embeddings():
        untie(model)


def _patterns(names: list[str]) -> set[str]:
    """Return globs for the last words of names: `*.down_proj`, for slices `*.experts.down_proj.*`."""
    slices = re.compile(r"^.*\.(\w+\.\w+)\.\d+$")
    return {
        f"*.{match[1]}.*" if (match := slices.match(name)) else f"*.{name.rpartition('.')[2]}"
        for name in names
    }

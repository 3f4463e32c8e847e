"""Apply a recipe to a model: `quantize`.

The result is a transformers model still. A *fake* quantized model holds the dequantized weights, so that
everything transformers can do works and runs at full speed; a *real* one (`packed=True`) holds the packed
codes. Both give the same logits. Parameters that the recipe leaves alone (embeddings, norms, the head) are
shared with the base model, not copied.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError, nearest
from bitassay.models.load import Identity
from bitassay.models.walk import walk
from bitassay.quantize.linear import QuantizedLinear
from bitassay.quantize.recipe import Recipe, find_recipe
from bitassay.quantize.tensor import QuantizedTensor, quantize_tensor
from bitassay.record.progress import Progress, silent


@dataclass(frozen=True)
class Quantization:
    """What was done to a model: the recipe, the quantized matrices by module name, and the new dense values
    of other parameters that the recipe changed, by full name."""

    recipe: Recipe
    tensors: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)


def quantize(
    base: PreTrainedModel, recipe: str | Path | Recipe, *, packed: bool = False, progress: Progress = silent
) -> PreTrainedModel:
    """A copy of `base` with the decoder layers' linears quantized by `recipe`; `base` stays as it is.

    packed: store codes (a real model) instead of dequantized weights (a fake one). The copy carries
    `.quantization`. Raises BitassayError where the recipe names modules that do not exist, where weights are
    not finite, or where the model has matrices that would be skipped.
    """
    return with_tensors(base, quantize_tensors(base, find_recipe(recipe), progress), packed=packed)


def quantize_tensors(base: PreTrainedModel, recipe: Recipe, progress: Progress = silent) -> Quantization:
    """The quantized matrices alone, without a model around them; errors as `quantize`."""
    known = getattr(base, "identity", None)
    if quantization_of(base) is not None or (isinstance(known, Identity) and known.recipe_id is not None):
        raise BitassayError("the model is quantized already", "quantize the base model instead")
    linears = check_recipe(base, recipe)
    tensors = {}
    for done, (name, linear) in enumerate(linears.items()):
        progress(f"quantizing by {recipe.name}", done, len(linears))
        if scheme := recipe.scheme_for(name):
            tensors[name] = quantize_tensor(linear.weight, scheme, name)
    progress(f"quantizing by {recipe.name}", len(linears), len(linears))
    return Quantization(recipe, tensors)


def with_tensors(
    base: PreTrainedModel, quantization: Quantization, *, packed: bool = False
) -> PreTrainedModel:
    """A copy of `base` with what `quantization` changed; everything else is shared."""
    model = _copy_sharing_parameters(base)
    for name, value in quantization.parameters.items():
        _replace_parameter(model, name, value)
    for name, tensor in quantization.tensors.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if packed:
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, QuantizedLinear(tensor, linear.bias, linear.weight.dtype)
            )
        else:
            linear.weight = nn.Parameter(tensor.dequantize().to(linear.weight.dtype), requires_grad=False)
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(model, "quantization", quantization)
    if isinstance(known := getattr(base, "identity", None), Identity):
        recipe = quantization.recipe
        object.__setattr__(model, "identity", known.with_recipe(recipe.recipe_id, recipe.name))
    return model


def quantization_of(model: PreTrainedModel) -> Quantization | None:
    """What was done to a model by `quantize`; None for one that was not quantized here."""
    return getattr(model, "quantization", None)


def check_recipe(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Linear]:
    """The model's linears, once it is sure that the recipe accounts for every matrix of the layers."""
    found = walk(model)
    names = list(found.linears) + list(found.experts) + list(found.others)
    for override in recipe.overrides:
        if not any(recipe.override_for(name) is override for name in names):
            raise BitassayError(
                f"recipe {recipe.name}: the override {override.match!r} applies to no module of "
                f"{type(model).__name__}; "
                f"the nearest names are {nearest(override.match, _last_words(names))}",
                "match full names with a glob, such as '*.down_proj' or 'model.layers.0.*'; "
                "the first match wins",
            )
    skipped = [name for name in (*found.experts, *found.others) if recipe.scheme_for(name) is not None]
    if skipped:
        kind = "fused experts" if skipped[0] in found.experts else "matrices that are not linears"
        pattern = "*.experts.*" if ".experts." in skipped[0] else f"*.{skipped[0].rpartition('.')[2]}"
        raise BitassayError(
            f"{type(model).__name__} has {kind} that this version cannot quantize, such as {skipped[0]}",
            f"leave them in high precision with an override: {{match: '{pattern}', weights: null}}",
        )
    return found.linears


def bits_per_weight(model: PreTrainedModel) -> float:
    """Average bits of a quantized weight, scales and zero points included; 16 for an unquantized model."""
    tensors = _tensors(model)
    weights = sum(t.shape[0] * t.shape[1] for t in tensors.values())
    return sum(t.stored_bits for t in tensors.values()) / weights if weights else 16.0


def size_bytes(model: PreTrainedModel) -> int:
    """Bytes of the whole checkpoint: packed matrices, and every other parameter (tied ones once) at 16
    bits."""
    tensors = _tensors(model)
    held = {f"{name}.weight" for name in tensors}
    other = sum(p.numel() for name, p in model.named_parameters() if name not in held)
    return other * 2 + sum(t.stored_bits for t in tensors.values()) // 8


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters of the dense model, tied ones once."""
    tensors = _tensors(model)
    held = {f"{name}.weight" for name in tensors}
    other = sum(p.numel() for name, p in model.named_parameters() if name not in held)
    return other + sum(t.shape[0] * t.shape[1] for t in tensors.values())


def _tensors(model: PreTrainedModel) -> dict[str, QuantizedTensor]:
    quantization = quantization_of(model)
    return quantization.tensors if quantization is not None else {}


def _copy_sharing_parameters(model: PreTrainedModel) -> PreTrainedModel:
    shared: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    attached = [getattr(model, name) for name in ("tokenizer", "identity") if hasattr(model, name)]
    return copy.deepcopy(model, {id(item): item for item in (*shared, *attached)})


def _replace_parameter(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Give `model` alone a new value, in the dtype of the old one; an output head that gets one is no longer
    the embedding."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module.get_parameter(key)
    module.register_parameter(key, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
    if module is model.get_output_embeddings():
        model.config.tie_word_embeddings = False


def _last_words(names: list[str]) -> set[str]:
    return {f"*.{name.rpartition('.')[2]}" for name in names}

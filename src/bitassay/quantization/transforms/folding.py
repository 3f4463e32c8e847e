"""Scales that pass from a linear's input to its weights: where a model has room for them.

`x W^T = (x / s)(W s)^T` for any s > 0, one number for each column of the input x. What multiplies the same
columns last can be divided by s, so that the model computes what it did:

    norm    -> the linears that read it    the gains of an RMSNorm: gain / s
    v_proj  -> o_proj                      the rows of v_proj and its bias. Attention mixes tokens, not
                                           columns; query heads that share a value head share its scales
    up_proj -> down_proj                   the rows of up_proj and its bias, where down_proj reads
                                           act(gate) * up
    inputs                                 every linear divides what it reads, at run time (`input_scales`)

Which linears read a norm is found by running the model on a few tokens and watching where the norm's output
goes: if it also goes where no scale can be folded (a router, fused experts), the norm is left alone. So are
LayerNorms, and the down projection behind an online rotation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.precision import exact
from bitassay.models.walk import decoder_layers, module_name, walk
from bitassay.quantization.recipe.transforms import Place
from bitassay.quantization.shapes import Columns
from bitassay.quantization.transforms.residual_stream import COLUMNS, ROWS, Norm, Weight, find_norm, probe

# Modules of an attention that see no values, or that multiply its output by column.
BESIDE_VALUES = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "gate_proj", "g_proj")
INPUT_SCALES = "input_scales"  # of a linear: the name of the parameter


@dataclass(frozen=True)
class Fold:
    """Somewhere to fold scales. producer and readers are full names; the readers' inputs are the same
    columns. shared: how many columns of the input, in runs of `width`, share a scale with the first run of
    theirs (query heads of a value head)."""

    place: Place
    producer: str
    readers: tuple[str, ...]
    norm: Norm | None = None
    sharing: int = 1
    width: int = 1

    def share(self, columns: Columns) -> Float[Tensor, " own"]:
        """Return the largest number of the columns that share a scale, for each scale."""
        if self.sharing == 1:
            return columns
        return columns.view(-1, self.sharing, self.width).amax(1).flatten()

    def spread(self, scales: Float[Tensor, " own"]) -> Columns:
        """Return each input column's scale: undoes `share`."""
        if self.sharing == 1:
            return scales
        return scales.view(-1, 1, self.width).expand(-1, self.sharing, -1).flatten()


def find_folds(model: PreTrainedModel, places: tuple[Place, ...]) -> tuple[list[Fold], dict[str, str]]:
    """Return all folds at `places`, and for every other linear of the decoder layers why it has none."""
    linears = walk(model).linears
    if "inputs" in places:
        return [Fold("inputs", name, (name,)) for name in linears], {}
    folds, refused = _norm_folds(model) if "norms" in places else ([], {})
    for name in linears:
        parent, _, child = name.rpartition(".")
        if child == "o_proj" and "values" in places:
            result = _value_fold(model, parent)
        elif child == "down_proj" and "up" in places:
            result = _up_fold(model, parent)
        else:
            continue
        if isinstance(result, Fold):
            folds.append(result)
        else:
            refused[name] = result
    covered = {reader for fold in folds for reader in fold.readers}
    others = [name for name in linears if name not in covered]
    return folds, {name: refused.get(name, "nothing before it can take up a scale") for name in others}


@torch.no_grad()
def fold(model: PreTrainedModel, where: Fold, scales: Float[Tensor, " own"]) -> Float[Tensor, " own"]:
    """Divide the producer's columns by the scales and multiply the readers' with them. Gains, and scales at
    run time, are rounded to what bf16 holds, since they may be stored so; returned are the scales used."""
    scales = exact(scales)
    producer = model.get_submodule(where.producer)
    if where.norm is not None:
        gain, offset = where.norm.gain(), where.norm.offset
        stored = (gain / scales - offset).bfloat16().double()
        usable = (stored + offset != 0) & (gain != 0)
        scales = torch.where(usable, gain / (stored + offset), 1)
        gains = torch.where(usable, stored, gain - offset)
        where.norm.weight.change(lambda _: gains)
    elif where.place == "inputs":
        scales = scales.bfloat16().double()
        divide_inputs(producer, scales.to(model.device, model.dtype))
    else:
        Weight(model, f"{where.producer}.weight").change(lambda weight: weight / scales[:, None], COLUMNS)
        if producer.bias is not None:
            Weight(model, f"{where.producer}.bias").change(lambda bias: bias / scales)
    for name in where.readers:
        Weight(model, f"{name}.weight").change(lambda weight: weight * where.spread(scales), ROWS)
    return scales.float()


def divide_inputs(linear: nn.Module, scales: Columns) -> None:
    """Let a linear divide what it reads, before it rounds it or does anything else with it."""
    linear.register_parameter(INPUT_SCALES, nn.Parameter(scales, requires_grad=False))
    linear.register_forward_pre_hook(_divided)


def _divided(linear: nn.Module, arguments: tuple) -> tuple:
    return (arguments[0] / linear.get_parameter(INPUT_SCALES), *arguments[1:])


def _norm_folds(model: PreTrainedModel) -> tuple[list[Fold], dict[str, str]]:
    folds, refused = [], {}
    linears = walk(model).linears
    for name, readers in _norm_readers(model).items():
        reading = tuple(reader for reader in readers if reader in linears)
        others = [reader for reader in readers if reader not in linears]
        try:
            if others:
                raise BitassayError(f"{name} also feeds {others[0]}, which takes no scale")
            norm = find_norm(model, name)
        except BitassayError as error:
            refused |= dict.fromkeys(reading, str(error))
            continue
        if reading:
            folds.append(Fold("norms", name, reading, norm))
    return folds, refused


def _norm_readers(model: PreTrainedModel) -> dict[str, list[str]]:
    """The modules with parameters that get the output, or a view of it, of each norm of a decoder layer."""
    layers = decoder_layers(model)
    inside = dict(layers.named_modules(prefix=module_name(model, layers)))
    readers: dict[str, list[str]] = {
        f"{module_name(model, layer)}.{name}": []
        for layer in layers
        for name, _ in layer.named_children()
        if name.endswith("norm")
    }
    outputs: dict[int, tuple[str, Tensor]] = {}  # by storage; held, so that no other tensor takes its place

    def put_out(name: str) -> Callable:
        def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
            outputs[output.untyped_storage()._cdata] = (name, output)

        return hook

    def read(name: str) -> Callable:
        def hook(_module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
            for value in (*arguments, *options.values()):
                if isinstance(value, Tensor) and value.untyped_storage()._cdata in outputs:
                    norm, _ = outputs[value.untyped_storage()._cdata]
                    if name not in readers[norm]:
                        readers[norm].append(name)

        return hook

    reading = [name for name, module in inside.items() if module._parameters and name not in readers]
    writes = (inside[name].register_forward_hook(put_out(name)) for name in readers)
    reads = (inside[name].register_forward_pre_hook(read(name), with_kwargs=True) for name in reading)
    with hooked(writes), hooked(reads):
        probe(model)
    return readers


def _value_fold(model: PreTrainedModel, attention: str) -> Fold | str:
    module = model.get_submodule(attention)
    values, back = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
    if not isinstance(values, nn.Linear) or not isinstance(back, nn.Linear):
        return f"{attention} has no v_proj"
    if hasattr(module, "v_norm"):
        return f"{attention} norms its values"
    children = [name for name, part in module.named_children() if any(True for _ in part.parameters())]
    if strange := [name for name in children if name not in BESIDE_VALUES]:
        return f"{attention}.{strange[0]} may come between v_proj and o_proj"
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int) or values.out_features % width or back.in_features % values.out_features:
        return f"{attention}: the columns of o_proj are not those of v_proj's heads"
    sharing = back.in_features // values.out_features
    return Fold("values", f"{attention}.v_proj", (f"{attention}.o_proj",), None, sharing, width)


def _up_fold(model: PreTrainedModel, mlp: str) -> Fold | str:
    module = model.get_submodule(mlp)
    up, gate, down = (getattr(module, f"{key}_proj", None) for key in ("up", "gate", "down"))
    if not all(isinstance(linear, nn.Linear) for linear in (up, gate, down)):
        return f"{mlp} has no gate_proj and up_proj"
    assert isinstance(down, nn.Linear)
    if down._forward_pre_hooks:
        return f"{mlp}.down_proj reads what a rotation at run time makes of up_proj's output"
    return Fold("up", f"{mlp}.up_proj", (f"{mlp}.down_proj",))

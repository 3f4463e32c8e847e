"""The compressed-tensors layout: codes that plain transformers, and engines such as vLLM, can read.

A weight is stored as codes and as what the library calls a strategy: which block of the matrix shares a
scale. It decodes `(q - z) * s` in the dtype it was loaded in, so in fp32 the weights are ours to the bit; in
16 bits the scales are rounded to the model's dtype first.

    codes       integers  `pack-quantized`: b bits a code in 32-bit words, each row padded to a whole word;
                          shifted to -2^(b-1) ... 2^(b-1)-1
                ternary   the same with b = 2, codes -1, 0, 1
                fp8_e4m3  `float-quantized`: torch.float8_e4m3fn
                int8, symmetric, where inputs are rounded too
                          `int-quantized`: torch.int8, which is what engines multiply as it is
    granularity tensor -> `tensor`, channel -> `channel`, groups that divide the row -> `group`;
                a shorter last group -> `block` of one row and that many columns
    zero points of groups and channels: b bits each, packed down the rows, as other tools write them and
                engines read them. For plain transformers they are int8 beside a `block`, one byte a group:
                compressed-tensors 0.20 expects packed ones unpacked when it prepares the model and packed
                when it decodes, so that transformers cannot load them. Both decode the same.

So there are two layouts: `vllm` (`grouped` below) and `compressed-tensors`, for plain transformers. They are
the same where no matrix has zero points.

Rounded inputs are said by bits, sign and whether each token has its own scale; one scale for all lies beside
the codes (`input_scale`, `input_zero_point`). How a token's scale is found the format does not say: from
largest magnitude m compressed-tensors takes m / 127.5 for int8, we m / 127. So a folder for engines is
written where it is asked for, and its model is not ours to the bit.

What the format cannot say exactly has an `obstacle`, and goes into the layout of `codes/storage.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import matrices as model_matrices
from bitassay.models.walk import walk
from bitassay.quantization.codes.storage import Expected, Stored, description
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes
from bitassay.quantization.export import plain_load
from bitassay.quantization.export.layout import Layout
from bitassay.quantization.export.plain_load import EXPERTS, expert_pieces
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.recipe.formats import FORMATS, INPUT_FORMATS
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.inputs import Activations, InputScheme
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import Quantization

E4M3 = torch.float8_e4m3fn


def obstacle(stored: Stored) -> str | None:
    """Return why the format cannot hold such a matrix exactly; None where it can."""
    scheme, fmt = stored.scheme, FORMATS[stored.scheme.format]
    obstacles = {
        "it has one level of scales": fmt.levels is not None,
        "its codes are evenly spaced": fmt.table is not None,
        "it has no codes of one bit without a zero": fmt.kind == "binary",
        f"its only 8-bit float is e4m3, not {fmt.name}": fmt.float_dtype not in (None, E4M3),
        "its grids are whole steps away from zero": scheme.offset > 0 or not scheme.whole_zero_points,
        "its groups are all of one size": Granularity.parse(scheme.granularity).block_sizes is not None,
        "it has no second plane of codes": stored.residual is not None,
        "it has no rotations": scheme.turned is not None,
        "it has no low-rank factors": stored.low_rank is not None,
    }
    return next((why for why, holds in obstacles.items() if holds), None)


def input_obstacle(scheme: InputScheme) -> str | None:
    """Return why the format cannot say that inputs are rounded by `scheme`; None where it can."""
    if scheme.outliers is not None:
        return "it has no columns in 16 bits beside codes"
    if scheme.scale == "dynamic" and scheme.scale_factor != 1:
        return "it has no factor on the scale of each token"
    fmt = INPUT_FORMATS[scheme.format]
    known = fmt.float_dtype is E4M3 if fmt.kind == "float" else fmt.bits in (4, 8)
    return None if known else f"engines know inputs of 4 and 8 bits and e4m3, not {fmt.name}"


def activations_obstacle(spec: Activations) -> str | None:
    """Return why the format cannot say that a recipe's inputs are rounded so; None where it can."""
    return next(filter(None, map(input_obstacle, spec.schemes)), None)


# Parts of a recipe that a folder for engines says where the layout is asked for, by steps of their own.
EXPRESSED: dict[str, Callable[[Any], str | None]] = {"activations": activations_obstacle}


def folder_obstacle(
    model: PreTrainedModel, recipe: Recipe, matrices: Mapping[str, Stored], asked: bool
) -> str | None:
    """Return the first thing that a folder cannot hold exactly, or plain transformers not load from it;
    rounded inputs may differ in their steps where the layout is asked for."""
    for name, part in recipe.parts.items():
        why = EXPRESSED[name](part) if asked and name in EXPRESSED else part.plain_obstacle
        if why:
            return f"the recipe's {name}: {why}"
    for name, stored in matrices.items():
        if why := obstacle(stored):
            return f"{name} in {stored.scheme.format} exactly: {why}"
    return plain_load.obstacle(model, matrices)


def grouped_obstacle(
    model: PreTrainedModel, recipe: Recipe, matrices: Mapping[str, Stored], asked: bool
) -> str | None:
    """Return the first thing that a folder for vLLM cannot hold exactly, or vLLM has no kernels for."""
    if why := folder_obstacle(model, recipe, matrices, asked):
        return why
    for name, view in model_matrices(plain_load.without_weights(model)).items():
        stored = matrices.get(name)
        if stored is None or _format(stored) != "pack-quantized":
            continue
        size, columns = Granularity.parse(stored.scheme.granularity).group_size, view.shape[1]
        if stored.scheme.granularity == "tensor":
            return f"{name}: vLLM reads packed integers by channels or groups, not with one scale for all"
        if size is not None and size < columns and columns % size:
            return f"{name}: groups of {size} do not divide its {columns} columns, which vLLM needs"
    return None


def with_inputs(stored: Stored, inputs: InputScheme | InputRounding | None) -> Stored:
    """Return how a matrix is stored here whose inputs are rounded by `inputs`; None: they are not."""
    if inputs is None:
        return stored
    if inputs.scale in (None, "dynamic"):
        return stored.model_copy(update={"inputs": "dynamic"})
    return stored.model_copy(update={"inputs": "static" if inputs.symmetric else "static-asymmetric"})


def input_args(inputs: InputRounding) -> QuantizationArgs:
    """Return how the library describes rounded inputs that have no `input_obstacle`."""
    fmt, dynamic = inputs.number_format, inputs.scale is None
    return QuantizationArgs(
        num_bits=int(fmt.bits),
        type="float" if fmt.kind == "float" else "int",  # type: ignore[arg-type]
        symmetric=inputs.symmetric,
        strategy="token" if dynamic else "tensor",  # type: ignore[arg-type]
        dynamic=dynamic,
    )


def input_tensors(inputs: InputRounding | None) -> dict[str, Tensor]:
    """Return what lies beside a matrix for its rounded inputs: nothing where each token has its own scale."""
    if inputs is None or inputs.scale is None:
        return {}
    tensors = {"input_scale": torch.tensor([inputs.scale])}
    if inputs.zero_point is not None:
        shifted = inputs.zero_point - 2 ** (int(inputs.number_format.bits) - 1)
        tensors["input_zero_point"] = torch.tensor([shifted], dtype=torch.int8)
    return tensors


def _as_bytes(stored: Stored) -> bool:
    return stored.inputs is not None and stored.scheme.format == "int8" and stored.scheme.symmetric


def weight_args(scheme: WeightScheme, shape: tuple[int, int], grouped: bool = False) -> QuantizationArgs:
    """Return how the library describes a matrix of `shape` quantized by `scheme`, which has no `obstacle`.
    grouped: with packed zero points wherever groups or channels say it."""
    fmt, granularity = FORMATS[scheme.format], Granularity.parse(scheme.granularity)
    common = {
        "num_bits": 2 if fmt.kind == "ternary" else int(fmt.bits),
        "type": "float" if fmt.kind == "float" else "int",
        "symmetric": scheme.symmetric,
    }
    columns, size = shape[1], granularity.group_size
    if granularity.name == "tensor":
        return QuantizationArgs(strategy="tensor", **common)  # type: ignore[arg-type]
    if grouped and size is not None and size >= columns:
        size = None
    if (scheme.symmetric or grouped) and size is None:
        return QuantizationArgs(strategy="channel", **common)  # type: ignore[arg-type]
    if (scheme.symmetric or grouped) and size is not None and columns % size == 0:
        return QuantizationArgs(strategy="group", group_size=size, **common)  # type: ignore[arg-type]
    return QuantizationArgs(strategy="block", block_structure=[1, min(size or columns, columns)], **common)  # type: ignore[arg-type]


def _packs_zero_points(args: QuantizationArgs) -> bool:
    return not args.symmetric and args.strategy in ("group", "channel")


def expected_tensors(stored: Stored, shape: tuple[int, int], grouped: bool = False) -> Expected:
    """Return dtype and shape of what is kept of a matrix `[out, in]`, by the library's names."""
    scheme = stored.scheme
    args = weight_args(scheme, shape, grouped)
    grid = (1,) if args.strategy == "tensor" else Granularity.parse(scheme.granularity).scale_shape(*shape)
    expected: Expected = {"weight_scale": (getattr(torch, scheme.scale_dtype), grid)}
    if stored.inputs in ("static", "static-asymmetric"):
        expected["input_scale"] = (torch.float32, (1,))
    if stored.inputs == "static-asymmetric":
        expected["input_zero_point"] = (torch.int8, (1,))
    if args.type == "float":
        return expected | {"weight": (E4M3, shape)}
    if _as_bytes(stored):
        return expected | {"weight": (torch.int8, shape)}
    expected["weight_packed"] = (torch.int32, (shape[0], math.ceil(shape[1] * args.num_bits / 32)))
    expected["weight_shape"] = (torch.int64, (2,))
    if _packs_zero_points(args):
        groups = Granularity.parse(scheme.granularity).scale_shape(*shape)[1]
        expected["weight_zero_point"] = (torch.int32, (math.ceil(shape[0] * args.num_bits / 32), groups))
    elif not args.symmetric:
        expected["weight_zero_point"] = (torch.int8, grid)
    return expected


def stored_tensors(
    tensor: QuantizedTensor, inputs: InputRounding | None = None, grouped: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a matrix and of how its inputs are rounded, under the library's names."""
    args = weight_args(tensor.scheme, tensor.shape, grouped)
    scale = tensor.scale.reshape(1) if args.strategy == "tensor" else tensor.scale
    stored = {"weight_scale": scale.contiguous(), **input_tensors(inputs)}
    if args.type == "float":
        return stored | {"weight": tensor.codes().to(E4M3)}
    if _as_bytes(with_inputs(description(tensor), inputs)):
        return stored | {"weight": tensor.codes().to(torch.int8)}
    shift, zero_points = _shift(args), tensor.zero_points()
    stored["weight_packed"] = pack_to_int32((tensor.codes() - shift).to(torch.int8), args.num_bits)
    stored["weight_shape"] = torch.tensor(tensor.shape)
    if zero_points is not None:
        whole = (zero_points - shift).to(torch.int8).reshape(scale.shape)
        packs = _packs_zero_points(args)
        stored["weight_zero_point"] = pack_to_int32(whole, args.num_bits, packed_dim=0) if packs else whole
    return stored


def read_tensor(
    parts: dict[str, Tensor], stored: Stored, shape: tuple[int, int], grouped: bool = False
) -> QuantizedTensor:
    """Invert `stored_tensors`, for `expected_tensors`. Raises BitassayError for what no writer makes."""
    scheme = stored.scheme
    args, fmt = weight_args(scheme, shape, grouped), FORMATS[scheme.format]
    scale = parts["weight_scale"].float().view(Granularity.parse(scheme.granularity).scale_shape(*shape))
    if "weight" in parts:
        return from_codes(parts["weight"].float(), scale, scheme)
    if parts["weight_shape"].tolist() != list(shape):
        raise BitassayError(f"weight_shape says {parts['weight_shape'].tolist()}, the model {list(shape)}")
    shift, zero_point = _shift(args), None
    codes = unpack_from_int32(parts["weight_packed"], args.num_bits, torch.Size(shape)).float() + shift
    lowest, highest = fmt.code_range(scheme.symmetric)
    if codes.min() < lowest or codes.max() > highest:
        raise BitassayError(f"weight_packed holds codes beyond {lowest} ... {highest}")
    if not args.symmetric:
        zero_point = parts["weight_zero_point"]
        if _packs_zero_points(args):
            zero_point = unpack_from_int32(zero_point, args.num_bits, scale.shape, packed_dim=0)
        zero_point = zero_point.float().reshape(scale.shape) + shift
        if zero_point.min() < lowest or zero_point.max() > highest:
            raise BitassayError(f"weight_zero_point holds values beyond {lowest} ... {highest}")
    return from_codes(codes, scale, scheme, zero_point=zero_point)


def _shift(args: QuantizationArgs) -> int:
    """Asymmetric codes start at 0 here and at -2^(b-1) there; zero points move along."""
    return 0 if args.symmetric else 2 ** (args.num_bits - 1)


def quantization_config(
    model: PreTrainedModel, quantization: Quantization, grouped: bool = False
) -> QuantizationConfig:
    """Return the library's configuration: a group for each distinct description, of which the commonest
    targets every Linear and the others name theirs; experts have their own; the rest is ignored. Raises
    BitassayError that names a matrix with an obstacle."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    pieces, experts = expert_pieces(model), None
    if alone := [name for name in quantization.inputs if name not in quantization.tensors]:
        raise BitassayError(
            f"{alone[0]}: a compressed-tensors folder rounds no inputs of a matrix that it does not quantize",
            "leave the layout to bitassay, or quantize it too",
        )
    for name, tensor in quantization.tensors.items():
        if why := obstacle(description(tensor)):
            raise BitassayError(
                f"{name}: a compressed-tensors folder cannot hold {tensor.scheme.format} exactly: {why}",
                "leave the layout to bitassay, or another recipe",
            )
        inputs = quantization.inputs.get(name)
        said = {
            "weights": weight_args(tensor.scheme, tensor.shape, grouped),
            "input_activations": None if inputs is None else input_args(inputs),
            "format": _format(with_inputs(description(tensor), inputs)),
        }
        if name in pieces:
            experts = said  # the same for all
        else:
            groups.setdefault(str(said), (said, []))[1].append(name)
    largest_first = sorted(groups.values(), key=lambda group: -len(group[1]))
    schemes = {
        f"group_{place}": QuantizationScheme(targets=names if place else ["Linear"], **said)
        for place, (said, names) in enumerate(largest_first)
    }
    if experts is not None:
        schemes[f"group_{len(schemes)}"] = QuantizationScheme(targets=[EXPERTS], **experts)
    formats = {str(getattr(scheme.format, "value", scheme.format)) for scheme in schemes.values()}
    return QuantizationConfig(
        config_groups=dict(schemes),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_left_alone(model, quantization),
    )


def describe(model: PreTrainedModel, quantization: Quantization, folder: Path, grouped: bool = False) -> None:
    """Say in config.json how the codes are stored, as the library does."""
    configuration = quantization_config(model, quantization, grouped)
    ModelCompressor(quantization_config=configuration).update_config(str(folder))


def _format(stored: Stored) -> str:
    if FORMATS[stored.scheme.format].kind == "float":
        return "float-quantized"
    return "int-quantized" if _as_bytes(stored) else "pack-quantized"


def _left_alone(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Modules that a target of every Linear would catch (in engines routers and experts too), left alone."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    modules = walk(model)
    parents = [name.rpartition(".")[0] for name in modules.routers]
    parents += [
        name.rpartition(".")[0] for name in modules.experts if f"{name}.0" not in quantization.tensors
    ]
    return list(dict.fromkeys(name for name in (*linears, *parents) if name not in quantization.tensors))


LAYOUT = Layout(
    expected_tensors,
    stored_tensors,
    read_tensor,
    describe,
    is_plain=True,
    obstacle=folder_obstacle,
    matrix_obstacle=obstacle,
    with_inputs=with_inputs,
    input_tensors=input_tensors,
    pieces=expert_pieces,
)
GROUPED = replace(
    LAYOUT,
    expected_tensors=partial(expected_tensors, grouped=True),
    stored_tensors=partial(stored_tensors, grouped=True),
    read_tensor=partial(read_tensor, grouped=True),
    describe=partial(describe, grouped=True),
    is_plain=False,
    obstacle=grouped_obstacle,
)

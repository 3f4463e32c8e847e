"""The compressed-tensors layout: codes that plain transformers, and engines such as vLLM, can read.

A weight is stored as codes and as what the library calls a strategy: which block of the matrix shares a
scale. It decodes `(q - z) * s` in the dtype it was loaded in, so in fp32 the weights are ours to the bit; in
16 bits the scales are rounded to the model's dtype first.

    codes       integers  `pack-quantized`: b bits a code in 32-bit words, each row padded to a whole word;
                          shifted to -2^(b-1) ... 2^(b-1)-1
                ternary   the same with b = 2, codes -1, 0, 1
                fp8_e4m3  `float-quantized`: torch.float8_e4m3fn
    granularity tensor -> `tensor`, channel -> `channel`, groups that divide the row -> `group`;
                with zero points, or a shorter last group -> `block` of one row and that many columns

The detour over `block` is there because transformers cannot load packed zero points of `group` and `channel`:
compressed-tensors 0.20 expects them unpacked when it prepares the model and packed when it decodes. Blocks
keep them as int8, one byte a group, and decode the same.

What the format cannot say exactly has an `obstacle`, and goes into the layout of `quantize/layout.py`.
"""

import math

import torch
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
from bitassay.models.walk import walk
from bitassay.quantize.formats import FORMATS
from bitassay.quantize.granularity import Granularity
from bitassay.quantize.layout import Expected, Stored, description
from bitassay.quantize.model import Quantization
from bitassay.quantize.scheme import WeightScheme
from bitassay.quantize.tensor import QuantizedTensor, from_codes

E4M3 = torch.float8_e4m3fn


def obstacle(stored: Stored) -> str | None:
    """Why the format cannot hold such a matrix exactly; None where it can."""
    fmt = FORMATS[stored.scheme.format]
    if fmt.kind == "binary":
        return "it has no codes of one bit without a zero"
    if fmt.kind == "float" and fmt.float_dtype is not E4M3:
        return f"its only 8-bit float is e4m3, not {fmt.name}"
    if stored.scheme.offset or stored.scheme.zero_point == "free":
        return "its grids are whole steps away from zero"
    if Granularity.parse(stored.scheme.granularity).block_sizes is not None:
        return "its groups are all of one size"
    if stored.residual is not None:
        return "it has no second plane of codes"
    if stored.scheme.turned is not None:
        return "it has no rotations"
    if stored.low_rank is not None:
        return "it has no low-rank factors"
    return None


def weight_args(scheme: WeightScheme, shape: tuple[int, int]) -> QuantizationArgs:
    """How the library describes a matrix of `shape` quantized by `scheme`, which has no `obstacle`."""
    fmt, granularity = FORMATS[scheme.format], Granularity.parse(scheme.granularity)
    common = {
        "num_bits": 2 if fmt.kind == "ternary" else int(fmt.bits),
        "type": "float" if fmt.kind == "float" else "int",
        "symmetric": scheme.symmetric,
    }
    columns, size = shape[1], granularity.group_size
    if granularity.name == "tensor":
        return QuantizationArgs(strategy="tensor", **common)  # type: ignore[arg-type]
    if scheme.symmetric and size is None:
        return QuantizationArgs(strategy="channel", **common)  # type: ignore[arg-type]
    if scheme.symmetric and size is not None and columns % size == 0:
        return QuantizationArgs(strategy="group", group_size=size, **common)  # type: ignore[arg-type]
    return QuantizationArgs(strategy="block", block_structure=[1, min(size or columns, columns)], **common)  # type: ignore[arg-type]


def expected_tensors(stored: Stored, shape: tuple[int, int]) -> Expected:
    """Dtype and shape of what is kept of a matrix `[out, in]`, by the library's names."""
    scheme = stored.scheme
    args = weight_args(scheme, shape)
    grid = (1,) if args.strategy == "tensor" else Granularity.parse(scheme.granularity).scale_shape(*shape)
    expected: Expected = {"weight_scale": (getattr(torch, scheme.scale_dtype), grid)}
    if args.type == "float":
        return expected | {"weight": (E4M3, shape)}
    expected["weight_packed"] = (torch.int32, (shape[0], math.ceil(shape[1] * args.num_bits / 32)))
    expected["weight_shape"] = (torch.int64, (2,))
    if not args.symmetric:
        expected["weight_zero_point"] = (torch.int8, grid)
    return expected


def stored_tensors(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one matrix, under the library's names for them."""
    args = weight_args(tensor.scheme, tensor.shape)
    scale = tensor.scale.reshape(1) if args.strategy == "tensor" else tensor.scale
    stored = {"weight_scale": scale.contiguous()}
    if args.type == "float":
        return stored | {"weight": tensor.codes().to(E4M3)}
    shift, zero_points = _shift(args), tensor.zero_points()
    stored["weight_packed"] = pack_to_int32((tensor.codes() - shift).to(torch.int8), args.num_bits)
    stored["weight_shape"] = torch.tensor(tensor.shape)
    if zero_points is not None:
        stored["weight_zero_point"] = (zero_points - shift).to(torch.int8).reshape(scale.shape)
    return stored


def read_tensor(parts: dict[str, Tensor], stored: Stored, shape: tuple[int, int]) -> QuantizedTensor:
    """The inverse of `stored_tensors`, for parts that are as `expected_tensors` says. Raises BitassayError
    for values that no writer makes."""
    scheme = stored.scheme
    args, fmt = weight_args(scheme, shape), FORMATS[scheme.format]
    scale = parts["weight_scale"].float().view(Granularity.parse(scheme.granularity).scale_shape(*shape))
    if args.type == "float":
        return from_codes(parts["weight"].float(), scale, scheme)
    if parts["weight_shape"].tolist() != list(shape):
        raise BitassayError(f"weight_shape says {parts['weight_shape'].tolist()}, the model {list(shape)}")
    shift, zero_point = _shift(args), None
    codes = unpack_from_int32(parts["weight_packed"], args.num_bits, torch.Size(shape)).float() + shift
    lowest, highest = fmt.code_range(scheme.symmetric)
    if codes.min() < lowest or codes.max() > highest:
        raise BitassayError(f"weight_packed holds codes beyond {lowest} ... {highest}")
    if not args.symmetric:
        zero_point = parts["weight_zero_point"].float().view(scale.shape) + shift
        if zero_point.min() < lowest or zero_point.max() > highest:
            raise BitassayError(f"weight_zero_point holds values beyond {lowest} ... {highest}")
    return from_codes(codes, scale, scheme, zero_point=zero_point)


def _shift(args: QuantizationArgs) -> int:
    """Asymmetric codes start at 0 here and at -2^(b-1) there; moving the zero points along leaves `q - z` as
    it is."""
    return 0 if args.symmetric else 2 ** (args.num_bits - 1)


def quantization_config(model: PreTrainedModel, quantization: Quantization) -> QuantizationConfig:
    """One config group for each distinct description: the commonest targets every Linear, the others name
    theirs; the rest is ignored. Raises BitassayError that names a matrix with an obstacle."""
    groups: dict[str, tuple[QuantizationArgs, list[str]]] = {}
    for name, tensor in quantization.tensors.items():
        if why := obstacle(description(tensor)):
            raise BitassayError(
                f"{name}: a compressed-tensors folder cannot hold {tensor.scheme.format} exactly: {why}",
                "leave the layout to bitassay, or another recipe",
            )
        args = weight_args(tensor.scheme, tensor.shape)
        groups.setdefault(args.model_dump_json(), (args, []))[1].append(name)
    largest_first = sorted(groups.values(), key=lambda group: -len(group[1]))
    schemes = {
        f"group_{place}": QuantizationScheme(
            targets=names if place else ["Linear"],
            weights=args,
            format="float-quantized" if args.type == "float" else "pack-quantized",  # type: ignore[arg-type]
        )
        for place, (args, names) in enumerate(largest_first)
    }
    formats = {str(getattr(scheme.format, "value", scheme.format)) for scheme in schemes.values()}
    return QuantizationConfig(
        config_groups=dict(schemes),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_left_alone(model, quantization),
    )


def _left_alone(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Modules that a target of every Linear would catch (routers and experts: in engines that build them from
    Linears) but the recipe did not.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = walk(model)
    parents = [name.rpartition(".")[0] for name in (*found.routers, *found.experts)]
    return list(dict.fromkeys(name for name in (*linears, *parents) if name not in quantization.tensors))

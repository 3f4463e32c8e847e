"""How our own layout stores a matrix, for what no standard format can express.
It holds binary, residual planes, low-rank factors and all else that a QuantizedTensor may have.

It is the QuantizedTensor itself, part by part, in safetensors files:

    <matrix>.packed     the codes without waste, `quantization/codes/packing.py`
    <matrix>.scale      one a group, in the scheme's dtype
    <matrix>.zero_point, .mean                    where the scheme has them
    <matrix>.residual.packed, .residual.scale ...  a second plane, stored alike, and where it is of some
    <matrix>.residual_columns                      columns alone, a bit for every column
    <matrix>.column_scale                          one a column
    <matrix>.multiples, .mean_multiples            of two levels: whole numbers, one a group; scale and mean
                                                   are then of 256 weights
    <matrix>.low_rank.a, .low_rank.b               factors in 16 bits

The card (`bitassay.json`) says which scheme each matrix has. Shapes are not stored: the model's configuration
has them, and the parts must fit them to the byte. `bitassay.load` reads the folder, plain transformers
refuses it.
"""

import math
from dataclasses import fields
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.quantization.codes.packing import PACKINGS, unpack
from bitassay.quantization.codes.tensor import LowRank, QuantizedTensor
from bitassay.quantization.recipe.formats import FORMATS, RUN, NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.spec import Spec
from bitassay.quantization.recipe.weights import WeightScheme

TERNARY_BYTES = 3**5  # a byte of five ternary codes is smaller

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Factors(Spec):
    """Low-rank factors `a [out, rank]` and `b [rank, in]`."""

    rank: int = Field(gt=0)
    dtype: Literal["float16", "bfloat16"]


class Stored(Spec):
    """How a matrix is stored, apart from its shape. inputs: where the format says how what meets the matrix
    is rounded, whether each token has its own scale, or one scale and perhaps a zero point lie beside the
    codes."""

    scheme: WeightScheme
    residual: "Stored | None" = None
    low_rank: Factors | None = None
    inputs: Literal["dynamic", "static", "static-asymmetric"] | None = None

    def residual_columns(self, columns: int) -> int:
        """Return how many columns of `columns` a second plane has."""
        return self.scheme.residual_columns(columns) or columns


def planned(scheme: WeightScheme, low_rank: Factors | None = None) -> Stored:
    """Return how a matrix that is quantized by `scheme` will be stored."""
    if scheme.copies is not None:
        stored = None
        for copy in reversed(range(scheme.copies.count)):
            stored = Stored(scheme=scheme.copies.scheme(scheme, copy), residual=stored, low_rank=None)
        assert stored is not None
        return stored
    plane = Stored(scheme=scheme.residual_scheme) if scheme.residual else None
    return Stored(scheme=scheme, residual=plane, low_rank=low_rank)


def description(tensor: QuantizedTensor) -> Stored:
    """Return how `tensor` is stored."""
    low_rank = tensor.low_rank
    return Stored(
        scheme=tensor.scheme,
        residual=None if tensor.residual is None else description(tensor.residual),
        low_rank=None
        if low_rank is None
        else Factors(rank=low_rank.a.shape[1], dtype=str(low_rank.a.dtype).removeprefix("torch.")),  # type: ignore[arg-type]
    )


def expected_tensors(stored: Stored, shape: tuple[int, int]) -> Expected:
    """Return dtype and shape of every part of a matrix `[out, in]`, by name."""
    scheme, (rows, columns) = stored.scheme, shape
    fmt, packing = FORMATS[scheme.format], PACKINGS[FORMATS[scheme.format].bits]
    grid = Granularity.parse(scheme.granularity).scale_shape(rows, columns)
    dtype = getattr(torch, scheme.scale_dtype)
    if fmt.levels is not None:
        return _two_levels(fmt, (rows, columns), packing.packed_bytes(rows * columns))
    expected: Expected = {
        "packed": (torch.uint8, (packing.packed_bytes(rows * columns),)),
        "scale": (dtype, grid),
    }
    if not scheme.symmetric and (fmt.kind == "binary" or scheme.zero_point == "minimum"):
        expected["mean"] = (dtype, grid)
    elif scheme.zero_point == "free":
        expected["zero_point"] = (dtype, grid)
    elif not scheme.symmetric:
        expected["zero_point"] = (torch.uint8, (packing.packed_bytes(grid[0] * grid[1]),))
    if scheme.column_scales:
        expected["column_scale"] = (dtype, (columns,))
    if stored.residual is not None:
        several = stored.residual_columns(columns)
        if several < columns:
            expected["residual_columns"] = (torch.uint8, (PACKINGS[1].packed_bytes(columns),))
        plane = expected_tensors(stored.residual, (rows, several))
        expected |= {f"residual.{part}": what for part, what in plane.items()}
    if (low_rank := stored.low_rank) is not None:
        dtype = getattr(torch, low_rank.dtype)
        expected["low_rank.a"] = (dtype, (rows, low_rank.rank))
        expected["low_rank.b"] = (dtype, (low_rank.rank, columns))
    return expected


def _two_levels(fmt: NumberFormat, shape: tuple[int, int], code_bytes: int) -> Expected:
    levels, (rows, columns) = fmt.levels, shape
    assert levels is not None
    shared = (torch.float16, (rows, columns // RUN))
    multiples = (torch.uint8, (PACKINGS[levels.bits].packed_bytes(rows * columns // levels.group),))
    expected: Expected = {"packed": (torch.uint8, (code_bytes,)), "scale": shared, "multiples": multiples}
    return expected | ({"mean": shared, "mean_multiples": multiples} if levels.minima else {})


def planned_bits(stored: Stored, shape: tuple[int, int]) -> int:
    """Return `QuantizedTensor.stored_bits` of a matrix of `shape`, without quantizing it."""
    tensor_bits = 8 * expected_bytes(expected_tensors(stored, shape))
    return tensor_bits + Granularity.parse(stored.scheme.granularity).layout_bits(shape[1])


def expected_bytes(expected: Expected) -> int:
    """Return the bytes that such tensors take."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values())


def stored_tensors(tensor: QuantizedTensor | LowRank) -> dict[str, Tensor]:
    """Return the parts of a matrix as contiguous tensors, by name: `scale`, `residual.scale` and so on."""
    parts: dict[str, Tensor] = {}
    for field in fields(tensor):
        value = getattr(tensor, field.name)
        if isinstance(value, Tensor):
            parts[field.name] = value.contiguous()
        elif isinstance(value, QuantizedTensor | LowRank):
            parts |= {f"{field.name}.{part}": kept for part, kept in stored_tensors(value).items()}
    return parts


def read_tensor(parts: dict[str, Tensor], stored: Stored, shape: tuple[int, int]) -> QuantizedTensor:
    """Invert `stored_tensors`, for `expected_tensors`. Raises BitassayError for what no writer makes."""
    tensors = {part: value for part, value in parts.items() if "." not in part}
    if FORMATS[stored.scheme.format].kind == "ternary" and tensors["packed"].max() >= TERNARY_BYTES:
        raise BitassayError("packed holds bytes that are no ternary codes")
    plane, several = _below(parts, "residual."), stored.residual_columns(shape[1])
    if "residual_columns" in tensors and unpack(tensors["residual_columns"], 1, shape[1]).sum() != several:
        raise BitassayError("residual_columns does not name as many columns as the residual has")
    factors = _below(parts, "low_rank.")
    return QuantizedTensor(
        stored.scheme,
        shape,
        **tensors,
        residual=None
        if stored.residual is None
        else read_tensor(plane, stored.residual, (shape[0], several)),
        low_rank=LowRank(**factors) if factors else None,
    )


def _below(parts: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {part.removeprefix(prefix): value for part, value in parts.items() if part.startswith(prefix)}

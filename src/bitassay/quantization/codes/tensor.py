"""A quantized matrix: packed codes and the grids they live on."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bitassay.quantization.codes.grid import Grid, split
from bitassay.quantization.codes.hadamard import seeded_hadamard
from bitassay.quantization.codes.packing import pack, unpack
from bitassay.quantization.codes.rounding import dequantize_
from bitassay.quantization.codes.scales import middle_zero_points
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix, PerGroup


@dataclass(frozen=True)
class LowRank:
    """`a b`, added to what the codes stand for; both factors in bf16 or fp16."""

    a: Float[Tensor, "out rank"]
    b: Float[Tensor, "rank in"]

    def product(self) -> Matrix:
        return self.a.float() @ self.b.float()

    def to(self, device: torch.device | str) -> "LowRank":
        return LowRank(self.a.to(device), self.b.to(device))


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[out, in]` as it would be stored.

    packed: codes, row by row, shifted to start at 0 (FP8: the raw bytes). scale: one a group, in the scheme's
    dtype. zero_point: packed like the codes, with as many bits, a middle one as the number of its place; a
    free one in the scale's dtype; or None. mean: one a group, or None.
    residual: a second plane, added to what the codes stand for; of the columns whose bits are set in
    residual_columns (packed), None for all. column_scale: what each column of the sum is multiplied by.
    low_rank: 16-bit factors, added last. Where the scheme is turned, codes stand for `W Q`.
    Of a format with two levels, scale and mean are d and e, one for 256 weights, and multiples and
    mean_multiples the packed whole numbers a and b, one a group; a that may be negative is shifted to start
    at 0.
    """

    scheme: WeightScheme
    shape: tuple[int, int]
    packed: UInt8[Tensor, " bytes"]
    scale: PerGroup
    zero_point: UInt8[Tensor, " zero_bytes"] | PerGroup | None = None
    mean: PerGroup | None = None
    residual: "QuantizedTensor | None" = None
    residual_columns: UInt8[Tensor, " bitmap_bytes"] | None = None
    column_scale: Columns | None = None
    low_rank: LowRank | None = None
    multiples: UInt8[Tensor, " multiple_bytes"] | None = None
    mean_multiples: UInt8[Tensor, " multiple_bytes"] | None = None

    @property
    def format(self) -> NumberFormat:
        return self.scheme.number_format

    @cached_property
    def granularity(self) -> Granularity:
        return Granularity.parse(self.scheme.granularity)

    def codes(self) -> Matrix:
        """Return the codes as the format defines them (binary: -1 and 1), as fp32 numbers."""
        raw = unpack(self.packed, self.format.bits, self.shape[0] * self.shape[1])
        if self.format.float_dtype is not None:
            every = torch.arange(256, dtype=torch.uint8, device=raw.device).view(self.format.float_dtype)
            return every.float().index_select(0, raw.int()).view(self.shape)  # faster than casting each
        if self.format.table is not None:
            values = torch.tensor(self.format.table, dtype=torch.float32, device=raw.device)
            return values.index_select(0, raw.int()).view(self.shape)
        step, lowest = _code_steps(self.format, self.scheme.symmetric)
        codes = raw.float()
        if step != 1:
            codes *= step
        if lowest != 0:
            codes += lowest
        return codes.view(self.shape)

    def zero_points(self) -> PerGroup | None:
        """Return zero points as fp32 numbers, None for a symmetric format."""
        if self.zero_point is None or self.scheme.zero_point == "free":
            return None if self.zero_point is None else self.zero_point.float()
        codes = unpack(self.zero_point, self.format.bits, self.scale.numel()).view(self.scale.shape)
        if self.scheme.zero_point == "middle":
            return middle_zero_points(self.format).to(codes.device)[codes.long()]
        return codes.float()

    @property
    def grid(self) -> Grid:
        """What the groups share, in fp32; its tensors are `[rows, groups]`."""
        mean = None if self.mean is None else self.mean.float()
        scheme, levels = self.scheme, self.format.levels
        if levels is not None:
            unit = self.scale.float().repeat_interleave(levels.groups, dim=1)
            scale = unit * self.scale_multiples()
            if mean is None:
                return Grid(self.format, scale, unit=unit)
            mean_unit = mean.repeat_interleave(levels.groups, dim=1)
            least = -(mean_unit * self.mean_multiples_of_groups())
            return Grid(self.format, scale, mean=least, unit=unit, mean_unit=mean_unit)
        return Grid(
            self.format, self.scale.float(), self.zero_points(), mean, scheme.offset, scheme.restricted
        )

    def scale_multiples(self) -> PerGroup:
        """Return the whole number a of each group, of a format with two levels, in fp32."""
        levels = self.format.levels
        assert levels is not None
        assert self.multiples is not None
        least = 0 if levels.minima else levels.scale_range[0]
        return self._per_group(self.multiples) + least

    def mean_multiples_of_groups(self) -> PerGroup:
        """Return the whole number b of each group, of a format with two levels and minima, in fp32."""
        assert self.mean_multiples is not None
        return self._per_group(self.mean_multiples)

    def _per_group(self, packed: UInt8[Tensor, " bytes"]) -> PerGroup:
        levels = self.format.levels
        assert levels is not None
        rows, groups = self.shape[0], self.shape[1] // levels.group
        return unpack(packed, levels.bits, rows * groups).view(rows, groups).float()

    def residual_indices(self) -> Int[Tensor, " residual"]:
        """Return the indices of the columns that have a second plane, in order."""
        if self.residual_columns is None:
            return torch.arange(self.shape[1], device=self.packed.device)
        return unpack(self.residual_columns, 1, self.shape[1]).nonzero()[:, 0]

    def dequantize(self) -> Matrix:
        """Return the weights that the codes stand for, in fp32."""
        groups = self.granularity.to_groups(self.codes())
        grids = split(self.granularity, self.grid, self.shape[1])
        parts = [dequantize_(q, grid) for q, grid in zip(groups, grids, strict=True)]
        weight = self.granularity.from_groups(parts, self.shape[0])
        if self.scheme.turned is not None:
            weight = seeded_hadamard(self.shape[1], self.scheme.turned).apply_transposed(weight)
        if self.residual is not None and self.residual_columns is None:
            weight = weight + self.residual.dequantize()
        elif self.residual is not None:
            weight[:, self.residual_indices()] += self.residual.dequantize()
        if self.column_scale is not None:
            weight = weight * self.column_scale.float()
        return weight if self.low_rank is None else weight + self.low_rank.product()

    @property
    def stored_bits(self) -> int:
        """Everything that has to be kept: codes, grids, groups, a second plane and where it is, factors."""
        kept = [self.packed, self.scale, self.zero_point, self.mean, self.residual_columns, self.column_scale]
        kept += [self.multiples, self.mean_multiples]
        kept += [] if self.low_rank is None else [self.low_rank.a, self.low_rank.b]
        bits = 8 * sum(part.nbytes for part in kept if part is not None)
        further = 0 if self.residual is None else self.residual.stored_bits
        return bits + self.granularity.layout_bits(self.shape[1]) + further

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """Return the same tensor on another device."""
        if self.packed.device == torch.device(device):
            return self
        held = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return replace(self, **{name: part.to(device) for name, part in held.items() if part is not None})


def from_codes(
    codes: Matrix,
    scale: PerGroup,
    scheme: WeightScheme,
    zero_point: PerGroup | None = None,
    mean: PerGroup | None = None,
    unit: PerGroup | None = None,
    mean_unit: PerGroup | None = None,
) -> QuantizedTensor:
    """Pack codes and grids, all given as fp32 numbers, one a group."""
    if unit is not None:
        return _with_two_levels(codes, scale, scheme, mean, unit, mean_unit)
    fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
    if fmt.float_dtype is not None:
        raw = codes.to(fmt.float_dtype).view(torch.uint8).reshape(-1)
    else:
        raw = _numbered(codes, fmt, scheme.symmetric).reshape(-1)
    return QuantizedTensor(
        scheme,
        (codes.shape[0], codes.shape[1]),
        pack(raw, fmt.bits),
        scale.to(dtype),
        _packed_zero_points(zero_point, scheme),
        None if mean is None else mean.to(dtype),
    )


def on_grid(codes: Matrix, grid: Grid, scheme: WeightScheme) -> QuantizedTensor:
    """Pack codes on a grid, whose tensors are `[rows, groups]`."""
    return from_codes(codes, grid.scale, scheme, *grid.tensors[1:])


def _with_two_levels(
    codes: Matrix,
    scale: PerGroup,
    scheme: WeightScheme,
    mean: PerGroup | None,
    unit: PerGroup,
    mean_unit: PerGroup | None,
) -> QuantizedTensor:
    levels = scheme.number_format.levels
    assert levels is not None
    least = 0 if levels.minima else levels.scale_range[0]

    def packed(values: PerGroup, units: PerGroup) -> Tensor:
        return pack((values / units).round().to(torch.uint8), levels.bits)

    tensor = QuantizedTensor(
        scheme,
        (codes.shape[0], codes.shape[1]),
        pack(_numbered(codes, scheme.number_format, scheme.symmetric), scheme.number_format.bits),
        unit[:, :: levels.groups].half(),
        multiples=packed(scale - least * unit, unit),
    )
    if mean is None or mean_unit is None:
        return tensor
    safe = torch.where(mean_unit > 0, mean_unit, 1)
    return replace(tensor, mean=mean_unit[:, :: levels.groups].half(), mean_multiples=packed(-mean, safe))


def _numbered(codes: Matrix, fmt: NumberFormat, symmetric: bool) -> UInt8[Tensor, "out in"]:
    """Return the number of each code, from 0."""
    if fmt.table is not None:
        values = torch.tensor(fmt.table, dtype=torch.float32, device=codes.device)
        return torch.bucketize(codes, values).to(torch.uint8)
    step, lowest = _code_steps(fmt, symmetric)
    shifted = codes - lowest
    return (shifted if step == 1 else shifted.div_(step)).to(torch.uint8)


def _code_steps(fmt: NumberFormat, symmetric: bool) -> tuple[int, int]:
    """Distance between neighbouring codes, and the lowest code: binary goes from -1 to 1 in one step of 2."""
    return (2 if fmt.kind == "binary" else 1), fmt.code_range(symmetric)[0]


def _packed_zero_points(zero_point: Tensor | None, scheme: WeightScheme) -> Tensor | None:
    if zero_point is None or scheme.zero_point == "free":
        return None if zero_point is None else zero_point.to(getattr(torch, scheme.scale_dtype))
    if scheme.zero_point == "middle":
        places = middle_zero_points(scheme.number_format)
        zero_point = ((zero_point - places[0]) / (places[1] - places[0])).round()
    return pack(zero_point.to(torch.uint8), scheme.number_format.bits)

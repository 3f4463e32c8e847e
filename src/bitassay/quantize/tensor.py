"""A quantized matrix: packed codes and the grids they live on.

Fake quantization is `quantize_tensor(w, scheme).dequantize()`.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.quantize.formats import FORMATS, NumberFormat
from bitassay.quantize.granularity import Granularity
from bitassay.quantize.packing import pack, unpack
from bitassay.quantize.rounding import dequantize, round_to_nearest
from bitassay.quantize.scales import Grid, grid_for
from bitassay.quantize.scheme import WeightScheme


@dataclass(frozen=True)
class LowRank:
    """`a b`, added to what the codes stand for; both factors in bf16 or fp16."""

    a: Float[Tensor, "out rank"]
    b: Float[Tensor, "rank in"]

    def product(self) -> Float[Tensor, "out in"]:
        return self.a.float() @ self.b.float()

    def to(self, device: torch.device | str) -> "LowRank":
        return LowRank(self.a.to(device), self.b.to(device))


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[out, in]` as it would be stored.

    packed: codes, row by row, shifted to start at 0 (FP8: the raw bytes). scale: one a group, in the scheme's
    dtype. zero_point: packed like the codes, with as many bits, or None. mean: one a group, or None.
    residual: a second plane, and low_rank: 16-bit factors; both are added to what the codes stand for.
    """

    scheme: WeightScheme
    shape: tuple[int, int]
    packed: UInt8[Tensor, " bytes"]
    scale: Float[Tensor, "rows groups"]
    zero_point: UInt8[Tensor, " zero_bytes"] | None = None
    mean: Float[Tensor, "rows groups"] | None = None
    residual: "QuantizedTensor | None" = None
    low_rank: LowRank | None = None

    @property
    def format(self) -> NumberFormat:
        return FORMATS[self.scheme.format]

    @cached_property
    def granularity(self) -> Granularity:
        return Granularity.parse(self.scheme.granularity)

    def codes(self) -> Float[Tensor, "out in"]:
        """Codes as the format defines them (binary: -1 and 1), as fp32 numbers."""
        raw = unpack(self.packed, self.format.bits, self.shape[0] * self.shape[1])
        if self.format.float_dtype is not None:
            return raw.view(self.format.float_dtype).float().view(self.shape)
        step, lowest = _code_steps(self.format, self.scheme.symmetric)
        return (raw.float() * step + lowest).view(self.shape)

    def zero_points(self) -> Float[Tensor, "rows groups"] | None:
        """Zero points as fp32 numbers, None for a symmetric format."""
        if self.zero_point is None:
            return None
        return unpack(self.zero_point, self.format.bits, self.scale.numel()).float().view(self.scale.shape)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weights that the codes stand for, in fp32."""
        columns, zero_points = self.shape[1], self.zero_points()
        split = self.granularity.scales_to_groups
        scales = split(self.scale.float(), columns)
        zeros = split(zero_points, columns) if zero_points is not None else [None] * len(scales)
        means = split(self.mean.float(), columns) if self.mean is not None else [None] * len(scales)
        groups = self.granularity.to_groups(self.codes())
        parts = [
            dequantize(q, Grid(s, z, m), self.format)
            for q, s, z, m in zip(groups, scales, zeros, means, strict=True)
        ]
        weight = self.granularity.from_groups(parts, self.shape[0])
        if self.residual is not None:
            weight = weight + self.residual.dequantize()
        return weight if self.low_rank is None else weight + self.low_rank.product()

    @property
    def stored_bits(self) -> int:
        """Everything that has to be kept: codes, scales, zero points, means, the residual, the factors."""
        kept = [self.packed, self.scale, self.zero_point, self.mean]
        if self.low_rank is not None:
            kept += [self.low_rank.a, self.low_rank.b]
        own = sum(part.numel() * part.element_size() * 8 for part in kept if part is not None)
        return own if self.residual is None else own + self.residual.stored_bits

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return replace(self, **{name: part.to(device) for name, part in held.items() if part is not None})


def quantize_tensor(
    weight: Float[Tensor, "out in"],
    scheme: WeightScheme,
    name: str = "weight",
    importance: Float[Tensor, " in"] | None = None,
) -> QuantizedTensor:
    """Round a matrix to nearest on the grids that `scheme` asks for, each column's error weighed by its
    `importance`: the mean squared input, or a Hessian's diagonal.

    Raises BitassayError that names the tensor where a value is NaN or infinite, or too large for the scale's
    dtype.
    """
    if not weight.isfinite().all():
        raise BitassayError(f"{name}: NaN or infinite weights cannot be quantized", "restore the checkpoint")
    fmt, granularity = FORMATS[scheme.format], Granularity.parse(scheme.granularity)
    dtype = getattr(torch, scheme.scale_dtype)
    # Half, since the range of a group and the distance from its mean are up to twice the largest weight.
    if weight.abs().max() > torch.finfo(dtype).max / 2:
        raise BitassayError(
            f"{name}: weights up to {weight.abs().max():.3g} overflow scales in {scheme.scale_dtype}",
            "scale_dtype: float32",
        )
    groups = granularity.to_groups(weight.detach().float())
    if importance is None:
        weighed = [None] * len(groups)
    else:
        weighed = granularity.to_groups(importance.float().expand(weight.shape))
    grids = [grid_for(group, scheme, weights) for group, weights in zip(groups, weighed, strict=True)]
    codes = [
        round_to_nearest(group, grid, fmt, scheme.symmetric)
        for group, grid in zip(groups, grids, strict=True)
    ]
    return from_codes(
        granularity.from_groups(codes, weight.shape[0]),
        granularity.from_groups([grid.scale for grid in grids], weight.shape[0]),
        scheme,
        zero_point=_joined(granularity, [grid.zero_point for grid in grids], weight.shape[0]),
        mean=_joined(granularity, [grid.mean for grid in grids], weight.shape[0]),
    )


def from_codes(
    codes: Float[Tensor, "out in"],
    scale: Float[Tensor, "rows groups"],
    scheme: WeightScheme,
    zero_point: Float[Tensor, "rows groups"] | None = None,
    mean: Float[Tensor, "rows groups"] | None = None,
) -> QuantizedTensor:
    """Pack codes and grids, all given as fp32 numbers."""
    fmt, dtype = FORMATS[scheme.format], getattr(torch, scheme.scale_dtype)
    if fmt.float_dtype is not None:
        raw = codes.to(fmt.float_dtype).view(torch.uint8).reshape(-1)
    else:
        step, lowest = _code_steps(fmt, scheme.symmetric)
        raw = ((codes - lowest) / step).to(torch.uint8)
    return QuantizedTensor(
        scheme,
        (codes.shape[0], codes.shape[1]),
        pack(raw, fmt.bits),
        scale.to(dtype),
        None if zero_point is None else pack(zero_point.to(torch.uint8), fmt.bits),
        None if mean is None else mean.to(dtype),
    )


def _code_steps(fmt: NumberFormat, symmetric: bool) -> tuple[int, int]:
    """Distance between neighbouring codes, and the lowest code: binary goes from -1 to 1 in one step of 2."""
    return (2 if fmt.kind == "binary" else 1), fmt.code_range(symmetric)[0]


def _joined(granularity: Granularity, parts: list[Tensor | None], rows: int) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return granularity.from_groups(present, rows) if present else None

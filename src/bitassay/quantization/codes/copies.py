"""A matrix as the sum of several quantized copies of itself: `W' = sum_i c_i W'_i`.

Parallel copies of one linear are one linear: `sum_i c_i (x W'_i^T) = x (sum_i c_i W'_i)^T`. So they are
merged: c_i goes into the i-th copy's scales, and each copy is the residual plane of the one before it.
Such a matrix is stored, packed, saved and run as any other.

What copies that differ can do for the error e of one of them, whose step is s (docs/replication.md measures
it):

    residual  copy i is what the copies before it left over; where the first scale is 1.3 times wider than is
              best for it alone, two planes mesh into one grid
    digits    copy i is digit i, most significant first, of the codes of one grid of n b bits (nested bit
              planes): with B = 2^b, q + 1/2 = sum_i (d_i + 1/2) B^(n-1-i), so that the sum is that grid's
              matrix, to the bit, and every solver of that grid applies
    offset    grids moved by i/n of a step: n roundings of w average to w rounded on a grid of step s/n, so
              that the error is e / n^2 (in energy), for the bits of n copies. They share one scale, the one
              whose mean has the least squared error: only with equal steps do they fall between each other
    others    errors that are independent at best average to e / n
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Grid, joined
from bitassay.quantization.codes.rounding import nearest, round_to_nearest
from bitassay.quantization.codes.scales import SEARCH_FACTORS, range_grid, rescaled
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix


def digit_planes(tensor: QuantizedTensor, scheme: WeightScheme) -> list[QuantizedTensor]:
    """Return one plane for each digit of the codes of `tensor`, which is on the grid of all bits."""
    copies, base, parts = scheme.copies, 2 ** int(scheme.number_format.bits), list[QuantizedTensor]()
    assert copies is not None
    rest = tensor.codes() + base**copies.count // 2
    for copy, copy_scheme in enumerate(copies.schemes(scheme)):
        value = base ** (copies.count - 1 - copy)
        grouped = copy_scheme.with_granularity(tensor.scheme.granularity)
        parts.append(from_codes(rest // value - base // 2, tensor.scale.float() * value, grouped))
        rest = rest % value
    return parts


def offset_copies(
    weight: Matrix, scheme: WeightScheme, importance: Columns | None = None
) -> list[QuantizedTensor]:
    """Return one copy for each offset, all on the scale that is best for their mean."""
    copies, granularity, w = scheme.copies, Granularity.parse(scheme.granularity), weight.float()
    assert copies is not None
    schemes = copies.schemes(scheme)
    offsets = [copy.offset for copy in schemes]
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance.float()
    groups, weighed = granularity.to_groups(w), granularity.to_groups(h.expand(w.shape))
    grids = [
        _shared_grid(group, part, scheme, offsets, copies.shares)
        for group, part in zip(groups, weighed, strict=True)
    ]
    shared, tensors = joined(granularity, grids, len(w)), []
    for copy in schemes:
        codes = [
            round_to_nearest(group, grid._replace(offset=copy.offset))
            for group, grid in zip(groups, grids, strict=True)
        ]
        matrix = granularity.from_groups(codes, len(w))
        tensors.append(from_codes(matrix, shared.scale, copy, shared.zero_point))
    return tensors


def _shared_grid(
    w: Float[Tensor, "groups size"],
    importance: Float[Tensor, "groups size"],
    scheme: WeightScheme,
    offsets: list[float],
    shares: tuple[float, ...],
) -> Grid:
    dtype, middle = getattr(torch, scheme.scale_dtype), sum(offsets) / len(offsets)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    first = best = range_grid(low, high, scheme.number_format, scheme.symmetric, dtype, middle)
    if scheme.scale != "mse":
        return best
    least = torch.full_like(best.scale, torch.inf)
    for factor in SEARCH_FACTORS:
        grid, total = rescaled(first, factor, dtype), torch.zeros_like(w)
        for offset, share in zip(offsets, shares, strict=True):
            total += share * nearest(w, grid._replace(offset=offset))[1]
        error = ((total - w).square() * importance).sum(1, keepdim=True)
        best = best._replace(scale=torch.where(error < least, grid.scale, best.scale))
        least = error.minimum(least)
    return best


def merged(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Return the sum of matrices as one, each the residual plane of the one before it."""
    *rest, total = parts
    for part in reversed(rest):
        total = replace(part, residual=total)
    return total


def planes(tensor: QuantizedTensor) -> list[QuantizedTensor]:
    """Return every plane of a merged matrix by itself. A residual of some columns alone stays where it is."""
    if tensor.residual is None or tensor.residual_columns is not None:
        return [tensor]
    return [replace(tensor, residual=None), *planes(tensor.residual)]


def scaled(tensor: QuantizedTensor, factor: float) -> QuantizedTensor:
    """Return `factor` times the matrix: its scales and means, rounded to what they are stored in."""
    if factor == 1:
        return tensor
    mean = None if tensor.mean is None else (tensor.mean.float() * factor).to(tensor.mean.dtype)
    return replace(tensor, scale=(tensor.scale.float() * factor).to(tensor.scale.dtype), mean=mean)

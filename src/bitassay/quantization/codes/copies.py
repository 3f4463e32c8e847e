"""A matrix as the sum of several quantized copies of itself: `W' = sum_i c_i W'_i`.

Parallel copies of one linear are one linear: `sum_i c_i (x W'_i^T) = x (sum_i c_i W'_i)^T`. So they are
merged: c_i goes into the i-th copy's scales, and each copy is the plane beside the one before it, in the
place that a QuantizedTensor has for residuals. Such a matrix is stored, packed, saved and run as any other.

What copies that differ can do for the error e of one of them, whose step is s:

    residual  copy i is what the copies before it left over. Two planes of the levels -1.5 ... 1.5 (int2 with
              offset 0.5), each on its own best scales, leave 16.9 dB of long Gaussian rows, 4 bits 19.3 dB.
              With the first scale 1.3 times wider (values: [1.3, 1]) the planes mesh into one grid of 16
              levels and leave 19.3 dB too, while the first plane alone goes from 9.2 to 8.3 dB
    digits    copy i is digit i, most significant first, of the codes of one grid of n b bits: with B = 2^b,

                  q + 1/2 = sum_i (d_i + 1/2) B^(n-1-i)

              so that the sum is that grid's matrix, to the bit, and whatever finds good codes finds these.
              The first plane alone is the grid cut off after b bits, and as wide as the whole
    offset    grids moved by i/n of a step: n roundings of w average to w rounded on a grid of step s/n, so
              that the error is e / n^2 (in energy), for the bits of n copies
    others    errors that are independent at best average to e / n

Copies on offset grids share one scale, the one whose mean has the least squared error, since only with
equal steps do they fall between each other.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.codes.rounding import dequantize, round_to_nearest
from bitassay.quantization.codes.scales import SEARCH_FACTORS, range_grid, rescaled
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes, joined, quantize_tensor
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme


def quantize_copies(
    weight: Float[Tensor, "out in"],
    scheme: WeightScheme,
    name: str,
    importance: Float[Tensor, " in"] | None = None,
) -> QuantizedTensor:
    """The copies that `scheme.copies` asks for, each rounded to nearest, as one matrix. Residual
    codes by GPTQ are `gptq_planes`."""

    copies, left = scheme.copies, weight.float()
    assert copies is not None
    if copies.differ == "digits":
        parts = digits(quantize_tensor(weight, copies.whole(scheme), name, importance), scheme)
    elif copies.differ == "offset":
        parts = offset_copies(weight, scheme, importance)
    else:
        parts = []
        for own in copies.schemes(scheme):
            parts.append(quantize_tensor(left, own, name, importance))
            if copies.differ == "residual":
                left = left - parts[-1].dequantize()
    return merged([scaled(part, share) for part, share in zip(parts, copies.shares, strict=True)])


def digits(whole: QuantizedTensor, scheme: WeightScheme) -> list[QuantizedTensor]:
    """A matrix on the grid of all bits as one plane for each digit of its codes."""
    copies, base, parts = scheme.copies, 2 ** int(scheme.number_format.bits), list[QuantizedTensor]()
    assert copies is not None
    rest = whole.codes() + base**copies.count // 2
    for copy, own in enumerate(copies.schemes(scheme)):
        value = base ** (copies.count - 1 - copy)
        settled = own.with_granularity(whole.scheme.granularity)
        parts.append(from_codes(rest // value - base // 2, whole.scale.float() * value, settled))
        rest = rest % value
    return parts


def offset_copies(
    weight: Float[Tensor, "out in"], scheme: WeightScheme, importance: Float[Tensor, " in"] | None = None
) -> list[QuantizedTensor]:
    """One copy for each offset, all on the scale that is best for their mean."""
    copies, fmt, granularity = scheme.copies, scheme.number_format, Granularity.parse(scheme.granularity)
    assert copies is not None
    schemes = copies.schemes(scheme)
    offsets = [own.offset for own in schemes]
    w = weight.float()
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance.float()
    codes: list[list[Tensor]] = [[] for _ in schemes]
    grids: list[Grid] = []
    for group, weighed in zip(
        granularity.to_groups(w), granularity.to_groups(h.expand(w.shape)), strict=True
    ):
        grid = _shared_grid(group, weighed, scheme, offsets, copies.shares)
        grids.append(grid)
        for own, offset in zip(codes, offsets, strict=True):
            own.append(round_to_nearest(group, grid._replace(offset=offset), fmt, scheme.symmetric))
    shared = joined(granularity, grids, len(w))
    return [
        from_codes(granularity.from_groups(own, len(w)), shared.scale, of_copy, shared.zero_point)
        for own, of_copy in zip(codes, schemes, strict=True)
    ]


def _shared_grid(
    w: Float[Tensor, "groups size"],
    importance: Float[Tensor, "groups size"],
    scheme: WeightScheme,
    offsets: list[float],
    shares: tuple[float, ...],
) -> Grid:
    fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
    middle = sum(offsets) / len(offsets)  # of the finer grid that they are together
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best = range_grid(low, high, fmt, scheme.symmetric, dtype, middle)
    if scheme.scale != "mse":
        return best
    first, least = best, torch.full_like(best.scale, torch.inf)
    for factor in SEARCH_FACTORS:
        grid, total = rescaled(first, factor, dtype), torch.zeros_like(w)
        for offset, share in zip(offsets, shares, strict=True):
            own = grid._replace(offset=offset)
            total += share * dequantize(round_to_nearest(w, own, fmt, scheme.symmetric), own, fmt)
        error = ((total - w).square() * importance).sum(1, keepdim=True)
        best = best._replace(scale=torch.where(error < least, grid.scale, best.scale))
        least = error.minimum(least)
    return best


def merged(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """The sum of matrices as one, each beside the one before it."""
    *rest, total = parts
    for part in reversed(rest):
        total = replace(part, residual=total)
    return total


def planes(tensor: QuantizedTensor) -> list[QuantizedTensor]:
    """What was merged: every plane by itself. A residual of some columns alone is no plane of its own."""
    if tensor.residual is None or tensor.residual_columns is not None:
        return [tensor]
    return [replace(tensor, residual=None), *planes(tensor.residual)]


def scaled(tensor: QuantizedTensor, factor: float) -> QuantizedTensor:
    """`factor` times the matrix: its scales and means, rounded to what they are stored in."""
    if factor == 1:
        return tensor
    mean = None if tensor.mean is None else (tensor.mean.float() * factor).to(tensor.mean.dtype)
    return replace(tensor, scale=(tensor.scale.float() * factor).to(tensor.scale.dtype), mean=mean)

"""Scales: how wide a step is, for every group at once.

absmax: the largest magnitude (asymmetric: the range, widened to hold zero) lands on the outermost code, so
nothing is clipped.

mse: the scale that minimises `sum (w - w')^2` within the group. For integers and FP8 it is searched over a
grid of multiples of the absmax scale, because the error is not convex in the scale; clipping the tails this
way is worth 2.2 dB at 2 bits on Gaussian weights in groups of 64, and comes within 7 % of the noise of the
best uniform quantizer of four levels (`tests/quantize/test_scales.py`). For ternary and binary the optimum is
exact:

    ternary   keep the k largest magnitudes, s = their mean; the error falls by (sum_k |w|)^2 / k, so scan k
    binary    s = mean |w|, or around the mean m: s = mean |w - m|

Scales are rounded to the dtype they will be stored in *before* any code is computed, so that the stored
numbers are the ones that were used.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantize.formats import FORMATS, NumberFormat
from bitassay.quantize.rounding import dequantize, round_to_nearest
from bitassay.quantize.scheme import WeightScheme

# 1.00 ... 0.30: of equally good scales the widest wins, so that nothing is clipped for nothing
SEARCH_FACTORS = tuple(1 - 0.025 * step for step in range(29))
BLOCK_ELEMENTS = 2**17  # a block of the search that stays in the cache


class Grid(NamedTuple):
    """What a group shares. scale > 0 (binary: >= 0); zero_point is a whole number of steps; mean is in the
    unit of the weights."""

    scale: Float[Tensor, "groups 1"]
    zero_point: Float[Tensor, "groups 1"] | None = None
    mean: Float[Tensor, "groups 1"] | None = None


def grid_for(
    w: Float[Tensor, "groups size"],
    scheme: WeightScheme,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Grid:
    """The grid that `scheme` asks for, one for each row of `w`. `importance` weighs the squared errors of
    scale: mse, such as by the mean squared input of each column; it may be zero, never negative."""
    fmt, dtype = FORMATS[scheme.format], getattr(torch, scheme.scale_dtype)
    if scheme.scale == "absmax":
        return absmax_grid(w, fmt, scheme.symmetric, dtype)
    return mse_grid(w, fmt, scheme.symmetric, dtype, importance)


def absmax_grid(
    w: Float[Tensor, "groups size"], fmt: NumberFormat, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The widest grid: no weight is clipped (beyond what rounding the scale to `dtype` costs)."""
    if symmetric:
        return Grid(_stored(w.abs().amax(1, keepdim=True) / fmt.largest, dtype))
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    _, qmax = fmt.code_range(symmetric=False)
    scale = _stored((high - low) / qmax, dtype)
    return Grid(scale, (-low / scale).round().clamp(0, qmax))


def mse_grid(
    w: Float[Tensor, "groups size"],
    fmt: NumberFormat,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Grid:
    """The grid with the least squared error: exact for ternary and binary, else of SEARCH_FACTORS. A group
    without importance is as if it had none given."""
    if importance is not None:
        importance = torch.where(importance.amax(1, keepdim=True) > 0, importance, 1)
    if fmt.kind == "ternary":
        return Grid(_stored(_ternary_scale(w, importance), dtype))
    if fmt.kind == "binary":
        if symmetric:
            return Grid(_mean(w.abs(), dtype, importance))
        mean = _mean(w, dtype, importance)
        return Grid(_mean((w - mean).abs(), dtype, importance), mean=mean)
    rows = max(1, BLOCK_ELEMENTS // w.shape[1])
    weighed = [None] * -(-len(w) // rows) if importance is None else importance.split(rows)
    blocks = [
        _search(block, fmt, symmetric, dtype, weights)
        for block, weights in zip(w.split(rows), weighed, strict=True)
    ]
    zero_point = None if symmetric else torch.cat([b.zero_point for b in blocks if b.zero_point is not None])
    return Grid(torch.cat([b.scale for b in blocks]), zero_point)


def _search(
    w: Float[Tensor, "groups size"],
    fmt: NumberFormat,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Float[Tensor, "groups size"] | None,
) -> Grid:
    widest = absmax_grid(w, fmt, symmetric, dtype)
    best_scale, least = widest.scale, torch.full_like(widest.scale, torch.inf)
    for factor in SEARCH_FACTORS:
        grid = widest._replace(scale=_stored(widest.scale * factor, dtype))
        errors = (dequantize(round_to_nearest(w, grid, fmt, symmetric), grid, fmt) - w).square()
        error = (errors if importance is None else errors * importance).sum(1, keepdim=True)
        better = error < least
        best_scale, least = torch.where(better, grid.scale, best_scale), torch.where(better, error, least)
    return widest._replace(scale=best_scale)


def _ternary_scale(
    w: Float[Tensor, "groups size"], importance: Float[Tensor, "groups size"] | None
) -> Float[Tensor, "groups 1"]:
    largest_first, order = w.abs().sort(dim=1, descending=True)
    if importance is None:
        weight = torch.ones_like(w, dtype=torch.float64)
    else:
        weight = importance.double().gather(1, order)
    kept, total = weight.cumsum(1), (weight * largest_first).cumsum(1)
    mean = total / kept.clamp(min=torch.finfo(torch.float64).tiny)
    best = (total * mean).argmax(1, keepdim=True)
    return mean.gather(1, best).float()


def _mean(
    w: Float[Tensor, "groups size"],
    dtype: torch.dtype,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Float[Tensor, "groups 1"]:
    """Each group's mean as it will read back from storage; summed in fp64, where no sum overflows."""
    if importance is None:
        return w.mean(1, keepdim=True, dtype=torch.float64).to(dtype).float()
    weight = importance.double()
    return ((w * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).to(dtype).float()


def _stored(scale: Float[Tensor, "groups 1"], dtype: torch.dtype) -> Float[Tensor, "groups 1"]:
    """`scale` as it will read back from storage; 1 where a group is all zero, never 0 and never infinite."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal number
    stored = scale.clamp(smallest, info.max).to(dtype).float()
    return torch.where(scale > 0, stored, torch.ones_like(stored))

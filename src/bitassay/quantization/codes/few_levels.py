"""Grids of ternary and binary groups, where the least squared error `sum h (w - w')^2` is exact; h is the
importance of each weight, or 1:

    ternary   keep the k largest magnitudes, s = their mean; the error falls by (sum_k |w|)^2 / k, so scan k
    binary    s = mean |w|; with a mean m: two levels m - s and m + s, each the mean of one end of the sorted
              weights, so scan where to part them
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Column, Grid, read_back, stored
from bitassay.quantization.recipe.formats import NumberFormat


def few_levels_grid(
    w: Float[Tensor, "groups size"],
    fmt: NumberFormat,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Grid:
    """The grid with the least squared error. No row of `importance` may be all zero."""
    if fmt.kind == "ternary":
        return Grid(stored(_ternary_scale(w, importance), dtype))
    if symmetric:
        return Grid(_mean(w.abs(), dtype, importance))
    low, high = _two_levels(w, importance)
    return Grid(read_back((high - low) / 2, dtype), mean=read_back((high + low) / 2, dtype))


def _ternary_scale(
    w: Float[Tensor, "groups size"], importance: Float[Tensor, "groups size"] | None
) -> Column:
    largest_first, order = w.abs().sort(dim=1, descending=True)
    if importance is None:
        weight = torch.ones_like(w, dtype=torch.float64)
    else:
        weight = importance.double().gather(1, order)
    kept, total = weight.cumsum(1), (weight * largest_first).cumsum(1)
    mean = total / kept.clamp(min=torch.finfo(torch.float64).tiny)
    best = (total * mean).argmax(1, keepdim=True)
    return mean.gather(1, best).float()


def _two_levels(
    w: Float[Tensor, "groups size"], importance: Float[Tensor, "groups size"] | None
) -> tuple[Column, Column]:
    """The two levels that are nearest to all weights together."""
    ordered, order = w.sort(dim=1)
    h = torch.ones_like(w) if importance is None else importance.gather(1, order)
    kept, total = h.double().cumsum(1), (h.double() * ordered).cumsum(1)
    above, rest = kept[:, -1:] - kept, total[:, -1:] - total
    tiny = torch.finfo(torch.float64).tiny
    low, high = total / kept.clamp(min=tiny), rest / above.clamp(min=tiny)
    # All weights below the split: one level, for both codes.
    high = torch.where(above > 0, high, low)
    best = (total * low + rest * high).argmax(1, keepdim=True)
    return low.gather(1, best).float(), high.gather(1, best).float()


def _mean(
    w: Float[Tensor, "groups size"],
    dtype: torch.dtype,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Column:
    """Each group's mean as it will read back from storage; summed in fp64, where no sum overflows."""
    if importance is None:
        return w.mean(1, keepdim=True, dtype=torch.float64).to(dtype).float()
    weight = importance.double()
    return ((w * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).to(dtype).float()

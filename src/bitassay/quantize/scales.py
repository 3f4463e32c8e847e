"""Scales and zero points: the grid of every group at once.

absmax: the largest magnitude (asymmetric: the range, widened to hold zero) lands on the outermost code, so
nothing is clipped.

percentile: the same for the range that holds that share of the magnitudes (asymmetric: of either side);
what lies beyond is clipped.

mse: the least squared error `sum h (w - w')^2` within the group, where h is the importance of each weight,
or 1. For integers and FP8 the error is not convex in the scale: SEARCH_FACTORS times the absmax scale are
tried, with `zero_point: searched` each together with the zero points next to the first one. Then, while the
error falls and REFINEMENTS times at most, the codes are kept and the grid is the least-squares fit to them:

    s = <h w, p> / <h p, p>     with p = q - z + o
    free zero point: the weighted regression of w on q, s = cov(w, q) / var(q), z = mean(q) - mean(w) / s

A middle zero point has one of 2^b places, evenly over the middle half of the codes (`middle_zero_points`),
in thirds of a step for int2: as many bits as a whole one, and a search for each place. A grid of few codes is
best nearly symmetric, but not for every group: of the energy of SmolLM2-135M's outputs int2 in groups of 64
loses 0.072 with whole zero points, 0.076 with none and an offset of 0.5, 0.058 so, 0.054 with free ones,
which take 0.22 bits more (`benchmarks/formats.py`).

A free zero point has three such searches, with narrower grids in the middle of the range and towards either
end (FREE_STARTS); together they leave 1 % more error than an exhaustive search on SmolLM2-135M's weights, the
middle alone 5 % (int2) and 10 % (int4) more.

Factors go below 0.5: the first scale of int2 puts the largest magnitude on the code 1, and stopping at 0.5
would cost a fifth more error there (SmolLM2-135M, groups of 64: 0.187 instead of 0.154 of the weights'
energy); those below 0.3 are for groups whose largest weights matter least (1.2 % less error at int2 weighed
by C4). Above 1.1 nothing was gained. For ternary and binary the optimum is exact:

    ternary   keep the k largest magnitudes, s = their mean; the error falls by (sum_k |w|)^2 / k, so scan k
    binary    s = mean |w|; with a mean m: two levels m - s and m + s, each the mean of one end of the sorted
              weights, so scan where to part them

A free zero point starts from the range itself, which need not hold zero; s is at least |w| / 4096 then, so
that z has a place in fp16.

Scales are rounded to the dtype they will be stored in *before* any code is computed, so that the stored
numbers are the ones that were used. A group of zeros has the scale 1; with an offset, which leaves no code
for zero, the smallest number that the dtype has.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitassay.quantize.formats import NumberFormat
from bitassay.quantize.rounding import dequantize, round_to_nearest
from bitassay.quantize.scheme import WeightScheme

# Of equally good scales the first wins, so that nothing is clipped for nothing.
SEARCH_FACTORS = (*(1 - 0.05 * step for step in range(19)), 1.05, 1.1)
REFINEMENTS = 2
FREE_REFINEMENTS = 5
FREE_STARTS = (0.0, -0.4, 0.4)
FREE_RANGE = 2.0**12  # the largest magnitude, in steps, of a free grid
BLOCK_ELEMENTS = 2**17  # a block of the search that stays in the cache

Column = Float[Tensor, "groups 1"]


class Grid(NamedTuple):
    """What a group shares. scale > 0 (binary: >= 0); zero_point is in steps, a whole number but where it is
    middle or free; mean is in the unit of the weights; offset, in steps, and restricted are the scheme's."""

    scale: Float[Tensor, "groups 1"]
    zero_point: Float[Tensor, "groups 1"] | None = None
    mean: Float[Tensor, "groups 1"] | None = None
    offset: float = 0.0
    restricted: bool = False

    def code_range(self, fmt: NumberFormat, symmetric: bool) -> tuple[int, int]:
        """Smallest and largest integer code."""
        low, high = fmt.code_range(symmetric)
        return low + self.restricted, high

    @property
    def shift(self) -> tuple[Tensor | None, Tensor | float | None]:
        """`z - o` as whole steps and what is left of them; None for nothing."""
        z, offset = self.zero_point, self.offset
        if z is None:
            return None, (-offset or None)
        whole = z.round()
        return whole, (-offset or None) if torch.equal(whole, z) else z - whole - offset

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.scale, self.zero_point, self.mean

    def each(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        """The grid with every tensor of it changed in the same way."""
        _, zero_point, mean = (None if part is None else change(part) for part in self.parts)
        return self._replace(scale=change(self.scale), zero_point=zero_point, mean=mean)


def grid_for(
    w: Float[Tensor, "groups size"],
    scheme: WeightScheme,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Grid:
    """The grid that `scheme` asks for, one for each row of `w`. `importance` weighs the squared errors of
    scale: mse, such as by the mean squared input of each column; it may be zero, never negative. A group
    without importance is as if it had none given."""
    if scheme.scale == "mse":
        if importance is not None:
            importance = torch.where(importance.amax(1, keepdim=True) > 0, importance, 1)
        grid = mse_grid(w, scheme, importance)
    else:
        grid = _first_grid(w, scheme)
    return rescaled(grid, scheme.scale_factor, getattr(torch, scheme.scale_dtype))


def rescaled(grid: Grid, factor: float, dtype: torch.dtype) -> Grid:
    """The grid with `factor` times its steps; one whose steps are zero (binary) as it is."""
    if factor == 1:
        return grid
    return grid._replace(
        scale=torch.where(grid.scale > 0, _stored(grid.scale * factor, dtype, True), grid.scale)
    )


def absmax_grid(
    w: Float[Tensor, "groups size"], fmt: NumberFormat, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The widest grid: no weight is clipped (beyond what rounding the scale to `dtype` costs)."""
    return range_grid(w.amin(1, keepdim=True), w.amax(1, keepdim=True), fmt, symmetric, dtype)


def range_grid(
    low: Column,
    high: Column,
    fmt: NumberFormat,
    symmetric: bool,
    dtype: torch.dtype,
    offset: float = 0.0,
) -> Grid:
    """The narrowest grid that holds `low` ... `high` and zero."""
    if symmetric:
        # Beyond half a step the other end of the range is the nearer one.
        reach = fmt.largest + offset if offset <= 0.5 else -fmt.code_range(symmetric=True)[0] - offset
        scale = torch.maximum(-low, high) / reach
        return Grid(_stored(scale, dtype, offset > 0), offset=offset)
    low, high = low.clamp(max=0), high.clamp(min=0)
    _, qmax = fmt.code_range(symmetric=False)
    scale = _stored((high - low) / qmax, dtype, offset > 0)
    return Grid(scale, (offset - low / scale).round().clamp(0, qmax), offset=offset)


def free_grid(low: Column, high: Column, fmt: NumberFormat, dtype: torch.dtype) -> Grid:
    """The narrowest grid with a free zero point that holds `low` ... `high`; both ends are codes."""
    _, qmax = fmt.code_range(symmetric=False)
    scale = _stored(torch.maximum((high - low) / qmax, _least_free_scale(low, high)), dtype)
    return Grid(scale, _read_back(-low / scale, dtype))


def middle_zero_points(fmt: NumberFormat) -> Float[Tensor, " places"]:
    """Where a middle zero point may lie; the first and the last place are codes."""
    quarter = 2 ** (int(fmt.bits) - 2)
    return torch.linspace(quarter, 3 * quarter - 1, 4 * quarter)


def percentiles(w: Float[Tensor, "groups size"], percent: float) -> Column:
    """The value below which `percent` of each row lie, linear between neighbours (numpy's default)."""
    place = (w.shape[1] - 1) * percent / 100
    below = int(place)
    ordered = w.sort(dim=1).values
    first, second = ordered[:, below : below + 1], ordered[:, min(below + 1, w.shape[1] - 1)].unsqueeze(1)
    return torch.lerp(first, second, place - below)


def mse_grid(
    w: Float[Tensor, "groups size"],
    scheme: WeightScheme,
    importance: Float[Tensor, "groups size"] | None = None,
) -> Grid:
    """The grid with the least squared error: exact for ternary and binary, else the best that the search
    finds. No row of `importance` may be all zero."""
    fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
    if fmt.kind == "ternary":
        return Grid(_stored(_ternary_scale(w, importance), dtype))
    if fmt.kind == "binary":
        if scheme.symmetric:
            return Grid(_mean(w.abs(), dtype, importance))
        low, high = _two_levels(w, importance)
        return Grid(_read_back((high - low) / 2, dtype), mean=_read_back((high + low) / 2, dtype))
    rows = max(1, BLOCK_ELEMENTS // w.shape[1])
    weighed = [None] * -(-len(w) // rows) if importance is None else importance.split(rows)
    found = [_search(block, scheme, h) for block, h in zip(w.split(rows), weighed, strict=True)]
    zero_points = [grid.zero_point for grid in found if grid.zero_point is not None]
    return found[0]._replace(
        scale=torch.cat([grid.scale for grid in found]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )


def _search(
    w: Float[Tensor, "groups size"], scheme: WeightScheme, importance: Float[Tensor, "groups size"] | None
) -> Grid:
    fmt = scheme.number_format

    def codes_and_error(grid: Grid) -> tuple[Tensor, Column]:
        codes = round_to_nearest(w, grid, fmt, scheme.symmetric)
        errors = (dequantize(codes, grid, fmt) - w).square_()
        return codes, (errors if importance is None else errors * importance).sum(1, keepdim=True)

    def better(grid: Grid, best: Grid, least: Column) -> tuple[Grid, Column]:
        _, error = codes_and_error(grid)
        return _where(error < least, grid, best), error.minimum(least)

    nothing = w.new_full((len(w), 1), torch.inf)
    overall, least_overall = None, nothing
    for first, lean in _starts(w, scheme):
        best, least = first, nothing
        for grid in _candidates(first, scheme, lean):
            best, least = better(grid, best, least)
        for _ in range(FREE_REFINEMENTS if scheme.zero_point == "free" else REFINEMENTS):
            codes, _ = codes_and_error(best)
            best, least = better(_fitted(codes, w, best, scheme, importance), best, least)
        overall = best if overall is None else _where(least < least_overall, best, overall)
        least_overall = least.minimum(least_overall)
    assert overall is not None
    return overall


def _where(chosen: Bool[Tensor, "groups 1"], grid: Grid, other: Grid) -> Grid:
    """`grid` where `chosen`, else `other`."""
    scale = torch.where(chosen, grid.scale, other.scale)
    if grid.zero_point is None or other.zero_point is None:
        return grid._replace(scale=scale)
    return grid._replace(scale=scale, zero_point=torch.where(chosen, grid.zero_point, other.zero_point))


def _first_grid(w: Float[Tensor, "groups size"], scheme: WeightScheme) -> Grid:
    """The widest grid, or the one that the percentile leaves."""
    fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
    if scheme.scale == "percentile" and scheme.symmetric:
        high = percentiles(w.abs(), scheme.percentile)
        low = -high
    elif scheme.scale == "percentile":
        low, high = percentiles(w, 100 - scheme.percentile), percentiles(w, scheme.percentile)
    else:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if scheme.zero_point == "free":
        return free_grid(low, high, fmt, dtype)
    grid = range_grid(low, high, fmt, scheme.symmetric, dtype, scheme.offset)
    return grid._replace(restricted=scheme.restricted)


def _starts(w: Float[Tensor, "groups size"], scheme: WeightScheme) -> Iterator[tuple[Grid, float]]:
    """The first grid of every search, and where narrower ones lie in it."""
    if scheme.zero_point == "middle":
        fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
        low, high, (_, qmax) = w.amin(1, keepdim=True), w.amax(1, keepdim=True), fmt.code_range(False)
        for place in middle_zero_points(fmt):
            scale = _stored(torch.maximum(-low / place, high / (qmax - place)), dtype)
            yield Grid(scale, place.expand_as(scale)), 0.0
        return
    first = _first_grid(w, scheme)
    for lean in FREE_STARTS if scheme.zero_point == "free" else (0.0,):
        yield first, lean


def _candidates(first: Grid, scheme: WeightScheme, lean: float) -> Iterator[Grid]:
    """The grids that the search tries, the first one first. A free grid that is narrower than the first lies
    in its middle (`lean` = 0), at its low or at its high end (-1, 1)."""
    dtype, zero_point = getattr(torch, scheme.scale_dtype), first.zero_point
    if zero_point is None or scheme.zero_point in ("integer", "middle"):
        for factor in SEARCH_FACTORS:
            yield first._replace(scale=_stored(first.scale * factor, dtype, scheme.offset > 0))
        return
    _, qmax = scheme.number_format.code_range(symmetric=False)
    if scheme.zero_point == "searched":
        for factor in SEARCH_FACTORS:
            scale = _stored(first.scale * factor, dtype, scheme.offset > 0)
            for step in (0, -1, 1):
                yield first._replace(scale=scale, zero_point=(zero_point + step).clamp(0, qmax))
        return
    yield first
    for factor in SEARCH_FACTORS[::2]:
        scale = _stored(first.scale * factor, dtype)
        middle = (qmax / 2 * (1 + lean * (1 - factor)) - zero_point) * first.scale
        yield first._replace(scale=scale, zero_point=_read_back(qmax / 2 - middle / scale, dtype))


def _fitted(
    codes: Float[Tensor, "groups size"],
    w: Float[Tensor, "groups size"],
    grid: Grid,
    scheme: WeightScheme,
    importance: Float[Tensor, "groups size"] | None,
) -> Grid:
    """The least-squares grid for given codes; where they do not determine a positive scale, `grid`'s."""
    dtype = getattr(torch, scheme.scale_dtype)
    h = torch.ones_like(w) if importance is None else importance
    if scheme.zero_point != "free":
        p = dequantize(codes, grid._replace(scale=torch.ones_like(grid.scale)), scheme.number_format)
        hp = h * p
        scale = (hp * w).sum(1, keepdim=True) / (hp * p).sum(1, keepdim=True)
        return grid._replace(scale=_stored(torch.where(scale > 0, scale, grid.scale), dtype))
    total = h.sum(1, keepdim=True)
    mean_q, mean_w = (h * codes).sum(1, keepdim=True) / total, (h * w).sum(1, keepdim=True) / total
    hq = h * (codes - mean_q)
    scale = (hq * (w - mean_w)).sum(1, keepdim=True) / (hq * (codes - mean_q)).sum(1, keepdim=True)
    least = _least_free_scale(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
    scale = _stored(torch.where(scale > 0, scale.maximum(least), grid.scale), dtype)
    return grid._replace(scale=scale, zero_point=_read_back(mean_q - mean_w / scale, dtype))


def _least_free_scale(low: Column, high: Column) -> Column:
    return torch.maximum(-low, high) / FREE_RANGE


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


def _read_back(values: Column, dtype: torch.dtype) -> Column:
    """`values` as they will read back from storage."""
    return values.to(dtype).float()


def _stored(scale: Column, dtype: torch.dtype, offset: bool = False) -> Column:
    """`scale` as it will read back from storage, never 0 and never infinite. Where a group is all zero: 1, or
    on a grid that has no zero, the smallest number there is."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal number
    stored = scale.clamp(smallest, info.max).to(dtype).float()
    return stored if offset else torch.where(scale > 0, stored, torch.ones_like(stored))

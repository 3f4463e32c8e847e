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
by C4). Above 1.1 nothing was gained. Ternary and binary have an exact optimum: `few_levels.py`.

A free zero point starts from the range itself, which need not hold zero; s is at least |w| / 4096 then, so
that z has a place in fp16.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitassay.quantization.codes.few_levels import few_levels_grid
from bitassay.quantization.codes.grid import Column, Grid, read_back, stored
from bitassay.quantization.codes.rounding import dequantize, round_to_nearest
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.weights import WeightScheme

# Of equally good scales the first wins, so that nothing is clipped for nothing.
SEARCH_FACTORS = (*(1 - 0.05 * step for step in range(19)), 1.05, 1.1)
REFINEMENTS = 2
FREE_REFINEMENTS = 5
FREE_STARTS = (0.0, -0.4, 0.4)
FREE_RANGE = 2.0**12  # the largest magnitude, in steps, of a free grid
BLOCK_ELEMENTS = 2**17  # a block of the search that stays in the cache


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
        scale=torch.where(grid.scale > 0, stored(grid.scale * factor, dtype, True), grid.scale)
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
        return Grid(stored(scale, dtype, offset > 0), offset=offset)
    low, high = low.clamp(max=0), high.clamp(min=0)
    _, qmax = fmt.code_range(symmetric=False)
    scale = stored((high - low) / qmax, dtype, offset > 0)
    return Grid(scale, (offset - low / scale).round().clamp(0, qmax), offset=offset)


def free_grid(low: Column, high: Column, fmt: NumberFormat, dtype: torch.dtype) -> Grid:
    """The narrowest grid with a free zero point that holds `low` ... `high`; both ends are codes."""
    _, qmax = fmt.code_range(symmetric=False)
    scale = stored(torch.maximum((high - low) / qmax, _least_free_scale(low, high)), dtype)
    return Grid(scale, read_back(-low / scale, dtype))


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
    if fmt.kind in ("ternary", "binary"):
        return few_levels_grid(w, fmt, scheme.symmetric, dtype, importance)
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
            scale = stored(torch.maximum(-low / place, high / (qmax - place)), dtype)
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
            yield first._replace(scale=stored(first.scale * factor, dtype, scheme.offset > 0))
        return
    _, qmax = scheme.number_format.code_range(symmetric=False)
    if scheme.zero_point == "searched":
        for factor in SEARCH_FACTORS:
            scale = stored(first.scale * factor, dtype, scheme.offset > 0)
            for step in (0, -1, 1):
                yield first._replace(scale=scale, zero_point=(zero_point + step).clamp(0, qmax))
        return
    yield first
    for factor in SEARCH_FACTORS[::2]:
        scale = stored(first.scale * factor, dtype)
        middle = (qmax / 2 * (1 + lean * (1 - factor)) - zero_point) * first.scale
        yield first._replace(scale=scale, zero_point=read_back(qmax / 2 - middle / scale, dtype))


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
        return grid._replace(scale=stored(torch.where(scale > 0, scale, grid.scale), dtype))
    total = h.sum(1, keepdim=True)
    mean_q, mean_w = (h * codes).sum(1, keepdim=True) / total, (h * w).sum(1, keepdim=True) / total
    hq = h * (codes - mean_q)
    scale = (hq * (w - mean_w)).sum(1, keepdim=True) / (hq * (codes - mean_q)).sum(1, keepdim=True)
    least = _least_free_scale(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
    scale = stored(torch.where(scale > 0, scale.maximum(least), grid.scale), dtype)
    return grid._replace(scale=scale, zero_point=read_back(mean_q - mean_w / scale, dtype))


def _least_free_scale(low: Column, high: Column) -> Column:
    return torch.maximum(-low, high) / FREE_RANGE

"""Scales and zero points: the grid of every group at once.

    absmax      the largest magnitude (asymmetric: the range, widened to hold zero) lands on the outermost
                code: nothing is clipped
    percentile  the same for the range that holds that share of the magnitudes (asymmetric: of either side)
    mse         the least squared error `sum h (w - w')^2` within the group; h is the importance of each
                weight, or 1

For integers and FP8 the error is not convex in the scale. SEARCH_FACTORS times the absmax scale are tried,
with `zero_point: searched` each together with the zero points next to the first one. Then, while the error
falls and REFINEMENTS times at most, the codes are kept and the grid is the least-squares fit to them:

    s = <h w, p> / <h p, p>     with p = q - z + o
    free zero point: the weighted regression of w on q, s = cov(w, q) / var(q), z = mean(q) - mean(w) / s

Of ternary and binary groups the optimum is exact (`few_levels_grid`):

    ternary   keep the k largest magnitudes, s = their mean; the error falls by (sum_k |w|)^2 / k, so scan k
    binary    s = mean |w|; with a mean m: two levels m - s and m + s, each the mean of one end of the sorted
              weights, so scan where to part them

Of a table of codes both signs of the scale have such a search, since its ends differ.

A middle zero point has one of 2^b places, evenly over the middle half of the codes, and a search for each;
docs/formats.md measures what that gains. A mirrored one has two, the two whole steps in the middle of the
codes, and a search for each: levels -8 ... 7 or -7 ... 8, which is what a scale of either sign says. A free
zero point starts from the range itself, which need not hold zero, and has three searches, with narrower grids
in the middle of the range and towards either end (FREE_STARTS); s is at least |w| / 4096 then, so that z has
a place in fp16. With a minimum in its place, `w' = q s + m`, the same search is done in fp32.

Factors go below 0.5 since the first scale of int2 puts the largest magnitude on the code 1; those below 0.3
are for groups whose largest weights matter least. Above 1.1 nothing was gained.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.models.precision import widest
from bitassay.quantization.codes.grid import Column, Grid, as_stored, combined, stored_scale
from bitassay.quantization.codes.rounding import dequantize, nearest
from bitassay.quantization.codes.two_levels import two_level_grid
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix

# Of equally good scales the first wins, so that nothing is clipped for nothing.
SEARCH_FACTORS = (*(1 - 0.05 * step for step in range(19)), 1.05, 1.1)
REFINEMENTS = 2
FREE_REFINEMENTS = 5
FREE_STARTS = (0.0, -0.4, 0.4)
FREE_RANGE = 2.0**12  # the largest magnitude, in steps, of a free grid
BLOCK_ELEMENTS = 2**17  # a block of the search that stays in the cache

Groups = Float[Tensor, "groups size"]


def matrix_grids(w: Matrix, scheme: WeightScheme, importance: Columns | None = None) -> list[Grid]:
    """Return the grids of a matrix, one for each tensor of `Granularity.to_groups`."""
    granularity = Granularity.parse(scheme.granularity)
    groups = granularity.to_groups(w)
    if importance is None:
        return [grid_for(group, scheme) for group in groups]
    weighed = granularity.to_groups(importance.float().expand(w.shape))
    return [grid_for(group, scheme, h) for group, h in zip(groups, weighed, strict=True)]


def grid_for(w: Groups, scheme: WeightScheme, importance: Groups | None = None) -> Grid:
    """Return the grid that `scheme` asks for, one for each row of `w`. `importance` weighs the squared errors
    of scale: mse, such as by the mean squared input of each column; it may be zero, never negative. A group
    without importance is treated as if none was given."""
    if scheme.scale == "mse":
        if importance is not None:
            importance = torch.where(importance.amax(1, keepdim=True) > 0, importance, 1)
        if scheme.number_format.levels is not None:
            grid = _on_two_levels(w, scheme, importance)
        elif scheme.zero_point == "minimum":
            grid = _with_minimum(w, scheme, importance)
        else:
            grid = mse_grid(w, scheme, importance)
    else:
        grid = _first_grid(w, scheme)
    return rescaled(grid, scheme.scale_factor, getattr(torch, scheme.scale_dtype))


def rescaled(grid: Grid, factor: float, dtype: torch.dtype) -> Grid:
    """Return the grid with `factor` times its steps; one whose steps are zero (binary) as it is."""
    if factor == 1:
        return grid
    scale = stored_scale(grid.scale * factor, dtype, offset=True)
    return grid._replace(scale=torch.where(grid.scale > 0, scale, grid.scale))


def absmax_grid(w: Groups, fmt: NumberFormat, symmetric: bool, dtype: torch.dtype) -> Grid:
    """Return the widest grid: no weight is clipped (beyond what rounding the scale to `dtype` costs)."""
    return range_grid(w.amin(1, keepdim=True), w.amax(1, keepdim=True), fmt, symmetric, dtype)


def range_grid(
    low: Column, high: Column, fmt: NumberFormat, symmetric: bool, dtype: torch.dtype, offset: float = 0.0
) -> Grid:
    """Return the narrowest grid that holds `low` ... `high` and zero."""
    if symmetric:
        # Beyond half a step the other end of the range is the nearer one.
        reach = fmt.largest + offset if offset <= 0.5 else -fmt.code_range(symmetric=True)[0] - offset
        scale = torch.maximum(-low, high) / reach
        return Grid(fmt, stored_scale(scale, dtype, offset > 0), offset=offset)
    low, high = low.clamp(max=0), high.clamp(min=0)
    _, qmax = fmt.code_range(symmetric=False)
    scale = stored_scale((high - low) / qmax, dtype, offset > 0)
    return Grid(fmt, scale, (offset - low / scale).round().clamp(0, qmax), offset=offset)


def free_grid(low: Column, high: Column, fmt: NumberFormat, dtype: torch.dtype) -> Grid:
    """Return the narrowest grid with a free zero point that holds `low` ... `high`; both ends are codes."""
    _, qmax = fmt.code_range(symmetric=False)
    scale = stored_scale(torch.maximum((high - low) / qmax, _least_free_scale(low, high)), dtype)
    return Grid(fmt, scale, as_stored(-low / scale, dtype))


def middle_zero_points(fmt: NumberFormat) -> Float[Tensor, " places"]:
    """Return where a middle zero point may lie; the first and the last of them are codes."""
    quarter = 2 ** (int(fmt.bits) - 2)
    return torch.linspace(quarter, 3 * quarter - 1, 4 * quarter)


def percentiles(w: Groups, percent: float) -> Column:
    """Return the value below which `percent` of each row lie, linear between neighbours (numpy's default)."""
    rank = (w.shape[1] - 1) * percent / 100
    below = int(rank)
    ordered = w.sort(dim=1).values
    first, second = ordered[:, below : below + 1], ordered[:, min(below + 1, w.shape[1] - 1)].unsqueeze(1)
    return torch.lerp(first, second, rank - below)


def mse_grid(w: Groups, scheme: WeightScheme, importance: Groups | None = None) -> Grid:
    """Return the grid with the least squared error that is found. No row of `importance` may be all zero."""
    grid_of = few_levels_grid if scheme.number_format.kind in ("ternary", "binary") else _search
    rows = max(1, BLOCK_ELEMENTS // w.shape[1])
    weighed = [None] * -(-len(w) // rows) if importance is None else importance.split(rows)
    blocks = [grid_of(block, scheme, h) for block, h in zip(w.split(rows), weighed, strict=True)]
    return combined(blocks, torch.cat)


def _with_minimum(w: Groups, scheme: WeightScheme, importance: Groups | None) -> Grid:
    """Return the grid of a free zero point z, with the mean `-z s` in its place."""
    dtype = getattr(torch, scheme.scale_dtype)
    free = mse_grid(w, scheme.model_copy(update={"zero_point": "free", "scale_dtype": "float32"}), importance)
    assert free.zero_point is not None
    scale = stored_scale(free.scale, dtype)
    return Grid(free.format, scale, mean=as_stored(-free.zero_point * free.scale, dtype))


def _on_two_levels(w: Groups, scheme: WeightScheme, importance: Groups | None) -> Grid:
    """Return the grid of a K type: first each group's own scale and minimum, then those of two levels."""
    fmt, levels = scheme.number_format, scheme.number_format.levels
    assert levels is not None
    changes: dict[str, Any] = {"scale_dtype": "float32"}
    if fmt.table is None:
        changes |= {"symmetric": False, "zero_point": "free" if levels.minima else "mirrored"}
    by_itself = scheme.model_copy(update=changes)  # no scheme of a recipe: codes on one level of scales
    h = torch.ones_like(w) if importance is None else importance
    rows = BLOCK_ELEMENTS // w.shape[1]
    parts = []
    for block, weighed in zip(w.split(rows), h.split(rows), strict=True):
        own = _search(block, by_itself, weighed)
        if fmt.table is not None:
            minimum, scale = torch.zeros_like(own.scale), own.scale
        elif levels.minima:
            assert own.zero_point is not None
            minimum = own.zero_point * own.scale
            # Where all weights are above zero the minimum is zero, and the scale reaches the largest.
            reach = block.amax(1, keepdim=True) / fmt.code_range(False)[1]
            scale = torch.where(minimum < 0, reach, own.scale)
        else:
            assert own.zero_point is not None
            backwards = own.zero_point < 2 ** (int(fmt.bits) - 1)
            minimum, scale = torch.zeros_like(own.scale), torch.where(backwards, -own.scale, own.scale)
        least = 0 if fmt.table is None else torch.finfo(torch.float16).tiny / 1024  # a table has no zero
        scale = torch.where(block.abs().amax(1, keepdim=True) > 0, scale, least)
        parts.append(two_level_grid(block, weighed, scale, minimum.clamp(min=0), fmt))
    return combined(parts, torch.cat)


def few_levels_grid(w: Groups, scheme: WeightScheme, importance: Groups | None = None) -> Grid:
    """Return the grid of ternary or binary groups with the least squared error."""
    fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
    wide = widest(w.device)
    h = torch.ones_like(w, dtype=wide) if importance is None else importance.to(wide)
    if fmt.kind == "binary" and scheme.symmetric:  # summed in fp64, where no sum overflows
        return Grid(fmt, as_stored((w.abs() * h).sum(1, keepdim=True) / h.sum(1, keepdim=True), dtype))
    ternary, tiny = fmt.kind == "ternary", torch.finfo(wide).tiny
    ordered, order = (w.abs() if ternary else w).sort(dim=1, descending=ternary)
    h = h.gather(1, order)
    weight, total = h.cumsum(1), (h * ordered).cumsum(1)
    low = total / weight.clamp(min=tiny)
    if ternary:
        best = (total * low).argmax(1, keepdim=True)
        return Grid(fmt, stored_scale(low.gather(1, best).float(), dtype))
    above, rest = weight[:, -1:] - weight, total[:, -1:] - total
    # With all weights below the split there is one level, for both codes.
    high = torch.where(above > 0, rest / above.clamp(min=tiny), low)
    best = (total * low + rest * high).argmax(1, keepdim=True)
    low, high = low.gather(1, best).float(), high.gather(1, best).float()
    return Grid(fmt, as_stored((high - low) / 2, dtype), mean=as_stored((high + low) / 2, dtype))


def _search(w: Groups, scheme: WeightScheme, importance: Groups | None) -> Grid:
    def better(grid: Grid, best: Grid, least: Column) -> tuple[Grid, Column]:
        errors = (nearest(w, grid)[1] - w).square_()
        error = (errors if importance is None else errors * importance).sum(1, keepdim=True)
        return _where(error < least, grid, best), error.minimum(least)

    overall, least_overall = None, w.new_full((len(w), 1), torch.inf)
    for first, lean in _starts(w, scheme):
        best, least = first, torch.full_like(least_overall, torch.inf)
        for grid in _candidates(first, scheme, lean):
            best, least = better(grid, best, least)
        for _ in range(FREE_REFINEMENTS if scheme.zero_point == "free" else REFINEMENTS):
            best, least = better(_fitted(w, best, scheme, importance), best, least)
        overall = best if overall is None else _where(least < least_overall, best, overall)
        least_overall = least.minimum(least_overall)
    assert overall is not None
    return overall


def _where(chosen: Tensor, grid: Grid, other: Grid) -> Grid:
    return combined([grid, other], lambda parts: torch.where(chosen, *parts))


def _first_grid(w: Groups, scheme: WeightScheme) -> Grid:
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
    return grid._replace(narrow_range=scheme.restricted)


def _starts(w: Groups, scheme: WeightScheme) -> Iterator[tuple[Grid, float]]:
    if scheme.zero_point in ("middle", "mirrored"):
        fmt, dtype = scheme.number_format, getattr(torch, scheme.scale_dtype)
        low, high, (_, qmax) = w.amin(1, keepdim=True), w.amax(1, keepdim=True), fmt.code_range(False)
        half = 2.0 ** (int(fmt.bits) - 1)
        mirrored = scheme.zero_point == "mirrored"
        places = torch.tensor([half, half - 1]) if mirrored else middle_zero_points(fmt)
        for zero_point in places.to(w.device):
            scale = stored_scale(torch.maximum(-low / zero_point, high / (qmax - zero_point)), dtype)
            yield Grid(fmt, scale, zero_point.expand_as(scale)), 0.0
        return
    if (table := scheme.number_format.table) is not None:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        for first, last, sign in ((table[0], table[-1], 1), (-table[-1], -table[0], -1)):
            scale = sign * torch.maximum(low / first, high / last)
            scale = stored_scale(scale, getattr(torch, scheme.scale_dtype), offset=True)
            yield Grid(scheme.number_format, scale), 0.0
        return
    first = _first_grid(w, scheme)
    for lean in FREE_STARTS if scheme.zero_point == "free" else (0.0,):
        yield first, lean


def _candidates(first: Grid, scheme: WeightScheme, lean: float) -> Iterator[Grid]:
    """Yield the grids that the search tries, the first one first. A free grid that is narrower than the first
    lies in its middle (`lean` = 0), at its low or at its high end (-1, 1)."""
    dtype, zero_point = getattr(torch, scheme.scale_dtype), first.zero_point
    if zero_point is not None and scheme.zero_point == "free":
        yield first
        _, qmax = first.code_range
        for factor in SEARCH_FACTORS[::2]:
            scale = stored_scale(first.scale * factor, dtype)
            middle = (qmax / 2 * (1 + lean * (1 - factor)) - zero_point) * first.scale
            yield first._replace(scale=scale, zero_point=as_stored(qmax / 2 - middle / scale, dtype))
        return
    for factor in SEARCH_FACTORS:
        no_zero = scheme.offset > 0 or first.format.table is not None
        grid = first._replace(scale=stored_scale(first.scale * factor, dtype, no_zero))
        yield grid
        if zero_point is not None and scheme.zero_point == "searched":
            for step in (-1, 1):
                yield grid._replace(zero_point=(zero_point + step).clamp(*first.code_range))


def _fitted(w: Groups, grid: Grid, scheme: WeightScheme, importance: Groups | None) -> Grid:
    """Return the least-squares grid for the codes on `grid`, with its scale where they determine none."""
    codes, _ = nearest(w, grid)
    dtype = getattr(torch, scheme.scale_dtype)
    h = torch.ones_like(w) if importance is None else importance
    if scheme.zero_point != "free":
        p = dequantize(codes, grid._replace(scale=torch.ones_like(grid.scale)))
        hp = h * p
        scale = (hp * w).sum(1, keepdim=True) / (hp * p).sum(1, keepdim=True)
        scale = torch.where(scale * grid.scale > 0, scale, grid.scale)
        return grid._replace(scale=stored_scale(scale, dtype))
    total = h.sum(1, keepdim=True)
    mean_q, mean_w = (h * codes).sum(1, keepdim=True) / total, (h * w).sum(1, keepdim=True) / total
    hq = h * (codes - mean_q)
    scale = (hq * (w - mean_w)).sum(1, keepdim=True) / (hq * (codes - mean_q)).sum(1, keepdim=True)
    least = _least_free_scale(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
    scale = stored_scale(torch.where(scale > 0, scale.maximum(least), grid.scale), dtype)
    return grid._replace(scale=scale, zero_point=as_stored(mean_q - mean_w / scale, dtype))


def _least_free_scale(low: Column, high: Column) -> Column:
    return torch.maximum(-low, high) / FREE_RANGE

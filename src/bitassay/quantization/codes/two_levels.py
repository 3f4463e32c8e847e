"""Grids of two levels, as llama.cpp's K types have them: `two_level_grid`.

256 weights of a row share an fp16 scale d and, with minima, an fp16 e; each group of 16 or 32 of them has
whole numbers a and b of few bits:

    w' = d a q - e b    with minima             w' = d a q      otherwise, with a on both sides of zero

Every group comes with the scale s and the minimum -m that suit it best by themselves (`scales.py`). Then

    start   d and e put the largest s and m on the outermost a and b, or some STARTS of it: clipping one group
            makes finer steps for the others
    numbers of each group, a and b are the pair next to the last one, up to REACH away, with the least error
            after rounding its weights anew
    shared  d and e are the least-squares fit to the codes and numbers, where the error then falls

and the last two again, ROUNDS times at most. The error is `sum h (w - w')^2` of the 256 weights.

Source: the types of ggml (`ggml-common.h`); the search is ours. ggml has one pass from the continuous scales
to whole numbers and does not come back to d and e.
"""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Column, Grid, as_stored
from bitassay.quantization.codes.rounding import nearest
from bitassay.quantization.recipe.formats import NumberFormat, TwoLevels

STARTS = (1.0, 0.9, 0.8)
REACH = 1
ROUNDS = 4

Groups = Float[Tensor, "groups size"]
Shared = Float[Tensor, "runs 1"]


class _Numbers(NamedTuple):
    """d and e, one a run; a and b, one a group, `[runs, groups of a run]`; e and b: None without minima."""

    d: Shared
    a: Float[Tensor, "runs groups"]
    e: Shared | None = None
    b: Float[Tensor, "runs groups"] | None = None

    def grid(self, fmt: NumberFormat) -> Grid:
        """Return the grid of all groups, one under the other."""

        def column(values: Tensor) -> Column:
            return values.expand_as(self.a).reshape(-1, 1)

        if self.e is None or self.b is None:
            return Grid(fmt, column(self.d * self.a), unit=column(self.d))
        mean, mean_unit = column(-(self.e * self.b)), column(self.e)
        return Grid(fmt, column(self.d * self.a), mean=mean, unit=column(self.d), mean_unit=mean_unit)


def two_level_grid(w: Groups, h: Groups, scale: Column, minimum: Column, fmt: NumberFormat) -> Grid:
    """Return the grid of two levels for groups in the order of the rows, those of whole runs of 256 weights.
    h: importances, none of a group all zero. scale: of either sign without minima, and zero for a group of
    zeros; minimum: m >= 0, of no account without minima."""
    levels = fmt.levels
    assert levels is not None
    s, m = scale.view(-1, levels.groups), minimum.view(-1, levels.groups)
    best, least = None, torch.full_like(s[:, :1], torch.inf)
    for start in STARTS:
        numbers = _start(s, m, levels, start)
        error = torch.full_like(least, torch.inf)
        for _ in range(ROUNDS):
            numbers, error = _neighbours(w, h, numbers, fmt)
            numbers, error = _shared(w, h, numbers, error, fmt)
        best = numbers if best is None else _chosen(error < least, numbers, best)
        least = error.minimum(least)
    assert best is not None
    return best.grid(fmt)


def _start(s: Tensor, m: Tensor, levels: TwoLevels, share: float) -> _Numbers:
    low, high = levels.scale_range
    # On the side that reaches further: a scale of either sign has one more step below zero.
    peak = s.gather(1, s.abs().argmax(1, keepdim=True))
    d = as_half(peak * share / (high if levels.minima else low))
    a = in_range(s / d, levels)
    if not levels.minima:
        return _Numbers(d, a)
    e = as_half(m.amax(1, keepdim=True) * share / high, may_be_zero=True)
    return _Numbers(d, a, e, (m / torch.where(e > 0, e, 1)).round().clamp(0, high))


def _neighbours(w: Groups, h: Groups, start: _Numbers, fmt: NumberFormat) -> tuple[_Numbers, Shared]:
    """Return the best numbers of each group next to these, and the error of each run."""
    levels = fmt.levels
    assert levels is not None
    best, least = start, torch.full_like(start.a, torch.inf)
    steps = range(-REACH, REACH + 1)
    # The start first, so that of equally good ones it stays.
    pairs = sorted(
        itertools.product(steps, steps if levels.minima else (0,)), key=lambda pair: pair != (0, 0)
    )
    for by_a, by_b in pairs:
        a = in_range(start.a + by_a, levels)
        b = None if start.b is None else (start.b + by_b).clamp(0, levels.scale_range[1])
        numbers = start._replace(a=a, b=b)
        error = _errors(w, h, numbers, fmt)
        best, least = _chosen(error < least, numbers, best), error.minimum(least)
    return best, least.sum(1, keepdim=True)


def _shared(
    w: Groups, h: Groups, numbers: _Numbers, least: Shared, fmt: NumberFormat
) -> tuple[_Numbers, Shared]:
    """Return d and e refitted to the codes where the error falls, and the error of each run."""
    codes = nearest(w, numbers.grid(fmt))[0]

    def summed(*factors: Tensor) -> Tensor:
        product = h
        for factor in factors:
            product = product * factor
        return product.sum(1).view_as(numbers.a)

    qq, qw = (summed(codes, codes) * numbers.a**2).sum(1, keepdim=True), summed(codes, w) * numbers.a
    qw = qw.sum(1, keepdim=True)
    if numbers.b is None or numbers.e is None:
        fitted = numbers._replace(d=_usable(qw / qq, numbers.d))
    else:
        bb = (summed() * numbers.b**2).sum(1, keepdim=True)
        qb = -(summed(codes) * numbers.a * numbers.b).sum(1, keepdim=True)
        bw = -(summed(w) * numbers.b).sum(1, keepdim=True)
        both = qq * bb - qb**2
        d = torch.where(both > 1e-6 * qq * bb, (qw * bb - bw * qb) / both, qw / qq)
        e = torch.where(both > 1e-6 * qq * bb, (bw * qq - qw * qb) / both, numbers.e)
        d, e = torch.where(d > 0, d, torch.nan), torch.where(e > 0, e, torch.nan)
        fitted = numbers._replace(d=_usable(d, numbers.d), e=_usable(e, numbers.e))
    error = _errors(w, h, fitted, fmt).sum(1, keepdim=True)
    return _chosen(error < least, fitted, numbers), error.minimum(least)


def _errors(w: Groups, h: Groups, numbers: _Numbers, fmt: NumberFormat) -> Tensor:
    return (nearest(w, numbers.grid(fmt))[1].sub_(w).square_() * h).sum(1).view_as(numbers.a)


def _chosen(first: Tensor, numbers: _Numbers, others: _Numbers) -> _Numbers:
    """Return `numbers` where `first`, by runs or by groups, is true; d and e are the same where by groups."""
    by_run = first.shape[1] == 1

    def either(ours: Tensor | None, theirs: Tensor | None, shared: bool) -> Tensor | None:
        if ours is None or theirs is None or (shared and not by_run):
            return ours
        return torch.where(first, ours, theirs)

    d, a = either(numbers.d, others.d, True), either(numbers.a, others.a, False)
    assert d is not None
    assert a is not None
    return _Numbers(d, a, either(numbers.e, others.e, True), either(numbers.b, others.b, False))


def in_range(multiples: Tensor, levels: TwoLevels) -> Tensor:
    """Return whole numbers a; zero, on which all weights would be alike, becomes one."""
    whole = multiples.round().clamp(*levels.scale_range)
    return torch.where(whole == 0, 1.0, whole)


def as_half(values: Tensor, may_be_zero: bool = False) -> Tensor:
    """Return values as fp16 holds them, never infinite, and never zero unless they may be: one then."""
    info = torch.finfo(torch.float16)
    smallest = info.smallest_normal * info.eps
    size = values.abs().clamp(smallest, info.max)
    stored = as_stored(torch.where(values < 0, -size, size), torch.float16)
    return torch.where(values != 0, stored, torch.zeros_like(stored) if may_be_zero else 1.0)


def _usable(fitted: Tensor, before: Tensor) -> Tensor:
    good = fitted.isfinite() & (fitted != 0)
    return torch.where(good, as_half(torch.where(good, fitted, 1.0)), before)

"""Intervals and tests: every one that the package prints is made here.

An interval is made on a scale on which the quantity has no bounds, so that it holds no impossible value. On
that scale the estimate is taken as normal, with a standard error by the delta method (Oehlert 1992). With
mean m and standard deviation s of n values, and Student's quantile t with n - 1 degrees of freedom:

    mean of positive values (losses, KL)  log: m exp(-+h), h = t s / (m sqrt n)
    mean of values in [a, b]              logit of p = (m - a) / (b - a): h = t s / ((b - a) p (1 - p) sqrt n)
    paired ratio of positives y / x       log: y / x exp(-+h), s of y_i / y - x_i / x
    paired difference y - x               log of the larger, say y: y exp(-+h) - x, s of (y_i - x_i) / y
    perplexity; ratios of times           log of what is above 1; log of their geometric mean
    share of items                        Wilson's score interval (1927), or Clopper and Pearson's (1934)
    median                                order statistics (Thompson 1936), without any assumption

The values belong to nearly independent units: windows, prompts, rounds; never tokens, whose neighbours depend
on each other. `benchmarks/coverage.py` measures how often the intervals hold the truth. There is no interval
(None) for fewer than FEWEST values (with two, an end is 9 standard deviations away, with three 2.5), for
values that are all equal or not finite. But two models that are equal on every unit differ by 0.

Two models on the same n items differ in the *discordant* items, b that only the first gets right and c that
only the second does:

    McNemar     b given b + c is Binomial(b + c, 1/2) for equally good models; exact, two-sided (1947)
    difference  (c - b) / n, with Tango's score interval: all values that the score test does not reject, the
                rest of the model at its constrained maximum likelihood (Tango 1998, Stat. Med. 17:891)
    Holm        the k-th smallest of m p-values times m - k + 1, made monotone (1979)

Wilson's interval is also needed for a count that is not whole (the AUC's), which scipy's refuses; scipy has
neither Tango's nor Holm's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import optimize, stats

from bitassay.errors import BitassayError

FEWEST = 3
ROUNDING = 1e-14  # by so small a share of the largest, equal values may differ
LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8

Interval = tuple[float, float] | None

LOG = "Student's t, log scale"
LOGIT = "Student's t, logit scale"
LOG_DIFFERENCE = "Student's t, paired, log scale of the larger"
LOG_RATIO = "Student's t, paired, log scale"
WILSON = "Wilson"
TANGO = "Tango, paired"
MEDIAN = "order statistics"
NONE = f"none (\N{EM DASH}) for fewer than {FEWEST} or without spread"


class Estimate(NamedTuple):
    """A value, and how it depends on each of n units: its error is nearly the mean of `parts` less their
    expected value. The parts of a mean are the values themselves."""

    value: float
    parts: Float64[np.ndarray, " n"]


def mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of values, as an estimate."""
    parts = np.asarray(values, dtype=np.float64)
    return Estimate(float(parts.mean()), parts)


def exp_mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return exp of the mean, as a perplexity is of losses; infinite where a float cannot hold it."""
    mean, parts = mean_of(values)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.exp(mean)
        return Estimate(float(value), value * (parts - mean))


def jackknife_of(value: float, without: Sequence[float]) -> Estimate:
    """Return any statistic of n units as an estimate, given its values without each of them in turn (Efron
    and Stein 1981)."""
    left_out = np.asarray(without, dtype=np.float64)
    return Estimate(value, (len(left_out) - 1) * (left_out.mean() - left_out))


def standard_error(parts: np.ndarray) -> float | None:
    """Return that of the mean of the parts; None where they say nothing of it."""
    if len(parts) < FEWEST or not np.isfinite(parts).all():
        return None
    scale = float(np.abs(parts).max())  # squares of what is very large or small are beyond a float
    if parts.max() / 2 - parts.min() / 2 <= ROUNDING * scale:
        return None
    return float((parts / scale).std(ddof=1)) * scale / len(parts) ** 0.5


def student_interval(estimate: Estimate, level: float = LEVEL) -> Interval:
    """Return the interval of a quantity without bounds."""
    reach = _reach(estimate.parts, 1.0, level)
    return None if reach is None else _finite(estimate.value - reach, estimate.value + reach)


def log_interval(estimate: Estimate, level: float = LEVEL) -> Interval:
    """Return the interval of a positive quantity."""
    reach = _reach(estimate.parts, estimate.value, level)
    return None if reach is None else _finite(*(estimate.value * _exp(sign * reach) for sign in (-1, 1)))


def logit_interval(estimate: Estimate, low: float = 0.0, high: float = 1.0, level: float = LEVEL) -> Interval:
    """Return the interval of a quantity between `low` and `high`; None where the estimate is one of them."""
    width = high - low
    share = (estimate.value - low) / width if width > 0 else 0.0
    reach = _reach(estimate.parts, width * share * (1 - share), level)
    if reach is None:
        return None
    # 1 / (1 + exp(-logit)) of logit p -+ h
    ends = (share / (share + (1 - share) * _exp(sign * reach)) for sign in (1, -1))
    return _finite(*(low + width * end for end in ends))


def log_ratio_interval(first: Estimate, second: Estimate, level: float = LEVEL) -> Interval:
    """Return that of second / first, both positive, on the same units; 1 where they are equal on each."""
    if _are_equal(first, second):
        return 1.0, 1.0
    if not (_is_positive(first.value) and _is_positive(second.value)):
        return None
    ratio = second.value / first.value
    return log_interval(
        Estimate(ratio, ratio * (second.parts / second.value - first.parts / first.value)), level
    )


def log_difference_interval(first: Estimate, second: Estimate, level: float = LEVEL) -> Interval:
    """Return that of second - first, both positive, on the same units: above -first where the second is the
    larger, below the second where it is not; 0 where they are equal on each unit."""
    if _are_equal(first, second):
        return 0.0, 0.0
    if second.value < first.value:
        mirrored = log_difference_interval(second, first, level)
        return None if mirrored is None else (-mirrored[1], -mirrored[0])
    ends = log_interval(Estimate(second.value, second.parts - first.parts), level)
    return None if ends is None else (ends[0] - first.value, ends[1] - first.value)


def visible_difference(first: Estimate, second: Estimate, alpha: float = ALPHA) -> float | None:
    """Return the smallest true difference that an interval at 1 - alpha would tell from 0 with probability
    POWER, given the spread of these units: (t of 1 - alpha / 2 + t of POWER) standard errors. None where they
    say nothing of their spread."""
    error = standard_error(second.parts - first.parts)
    if error is None:
        return None
    freedom = len(first.parts) - 1
    return float(stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(POWER, freedom)) * error


def geometric_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Return that of the geometric mean of positive values, such as ratios of times."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = student_interval(mean_of(np.log(values)), level)
    return None if ends is None else _finite(*map(_exp, ends))


def median_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Return that of the median: from the k-th smallest to the k-th largest value, with the largest k for
    which that holds the median at `level`. None for too few values: fewer than 6 at 95 %."""
    ends = stats.quantile_test(np.asarray(values, dtype=np.float64), p=0.5).confidence_interval(level)
    return _finite(float(ends.low), float(ends.high))


def wilson_interval(count: float, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of count / items. The count need not be whole."""
    assert 0 <= count <= items > 0
    z = float(stats.norm.ppf((1 + level) / 2))
    share = count / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * np.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2)
    low = 0.0 if share == 0 else max(float(middle - half), 0.0)
    return low, 1.0 if share == 1 else min(float(middle + half), 1.0)


def clopper_pearson_interval(count: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return all shares that a two-sided exact test of count / items does not reject: never too narrow."""
    ends = stats.binomtest(count, items).proportion_ci(level, method="exact")
    return float(ends.low), float(ends.high)


def _reach(parts: np.ndarray, slope: float, level: float) -> float | None:
    """Return half the width of an interval on its scale, whose unit is worth `slope` at the estimate."""
    error = standard_error(parts)
    if error is None or not _is_positive(slope):
        return None
    return float(stats.t.ppf((1 + level) / 2, len(parts) - 1)) * error / slope


def _are_equal(first: Estimate, second: Estimate) -> bool:
    return len(first.parts) >= FEWEST and np.array_equal(first.parts, second.parts)


def _is_positive(value: float) -> bool:
    return bool(np.isfinite(value)) and value > 0


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _finite(low: float, high: float) -> Interval:
    """Return None where an end is NaN or beyond a float: the values say next to nothing."""
    return (low, high) if np.isfinite(low) and np.isfinite(high) else None


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same items: `first_only` items that only the first gets right, `second_only` that
    only the second does. `difference` is the second's accuracy less the first's, a fraction, with its
    `interval`; `p_value` is McNemar's; `visible_difference` is that of `smallest_difference` for as many
    discordant items."""

    items: int
    first_only: int
    second_only: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    visible_difference: float


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], level: float = LEVEL, alpha: float = ALPHA
) -> PairedDifference:
    """Compare two models by which items each gets right: the interval at `level`, the smallest difference
    that a test at `alpha` would show. Raises BitassayError for no items or different numbers of them."""
    if len(first) != len(second) or not len(first):
        raise BitassayError(
            f"{len(first)} items cannot be paired with {len(second)}", "compare models on the same items"
        )
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    n, first_only, second_only = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    return PairedDifference(
        n,
        first_only,
        second_only,
        (second_only - first_only) / n,
        difference_interval(second_only, first_only, n, level),
        mcnemar(first_only, second_only),
        smallest_difference(n, first_only + second_only, alpha),
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the exact two-sided p-value of McNemar's test; 1 without discordant items."""
    discordant = first_only + second_only
    return float(stats.binomtest(first_only, discordant).pvalue) if discordant else 1.0


def difference_interval(gained: int, lost: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Tango's score interval of (gained - lost) / items, where of `items` pairs `gained` changed from
    wrong to right and `lost` the other way; within [-1, 1]."""
    z = float(stats.norm.ppf((1 + level) / 2))
    estimate = (gained - lost) / items

    def end(z: float, low: float, high: float) -> float:
        """Where Tango's statistic, which falls with the difference, passes `z` between `low` and `high`."""
        margin = 1e-12  # at -1 and 1 the statistic is 0 / 0, or infinite
        low, high = max(low, margin - 1), min(high, 1 - margin)
        if _score(gained, lost, items, low) <= z:
            return low
        if _score(gained, lost, items, high) >= z:
            return high
        root = optimize.brentq(lambda delta: _score(gained, lost, items, delta) - z, low, high, xtol=1e-12)
        return float(root)  # type: ignore[arg-type]

    return (
        -1.0 if estimate == -1 else end(z, -1.0, estimate),
        1.0 if estimate == 1 else end(-z, estimate, 1.0),
    )


def _score(gained: int, lost: int, items: int, delta: float) -> float:
    """How many standard errors (gained - lost) / items lies above `delta`, with the share of lost pairs at
    its maximum likelihood given `delta`."""
    a = 2 * items
    b = -gained - lost + (2 * items - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    lost_share = (np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * lost_share + delta * (1 - delta))
    excess = gained - lost - items * delta
    if variance <= 0:
        return 0.0 if excess == 0 else float(np.copysign(np.inf, excess))
    return float(excess / np.sqrt(variance))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for so many comparisons, in the order given; at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    scaled = np.arange(len(order), 0, -1) * np.asarray(p_values)[order]
    adjusted[order] = np.maximum.accumulate(np.minimum(scaled, 1.0))
    return adjusted.tolist()


def smallest_difference(items: int, discordant: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest true difference of accuracies that `items` items would show, a fraction (above 1:
    none).

    Definition: two models disagree on `discordant` of the items; at that difference the exact two-sided
    McNemar test at level `alpha` rejects with probability `power`. Where so few disagreements could never
    reject (fewer than 6 at 5 %), the smallest number that can is taken.
    """
    fewest = int(np.ceil(np.log2(2 / alpha)))  # all in one direction: p = 2 / 2^m
    m = max(discordant, fewest)
    # The test rejects where one model wins at most `critical` of the m disagreements.
    critical = int(np.count_nonzero(stats.binom.cdf(np.arange(m + 1), m, 0.5) <= alpha / 2)) - 1

    def lacking_power(share: float) -> float:
        """How much power is missing where the better model wins this share of disagreements."""
        wins = stats.binom.sf(m - critical - 1, m, share) + stats.binom.cdf(critical, m, share)
        return power - float(wins)

    share = float(optimize.brentq(lacking_power, 0.5, 1.0))  # type: ignore[arg-type]
    return (2 * share - 1) * m / items

"""Intervals and tests. Every interval of the package is one of these.

An interval is made on a scale on which the quantity has no bounds, so that it holds nothing that the quantity
cannot be. There, the estimate is taken as normal with a standard error by the delta method:

    mean of positive values (losses, KL)  log: m exp(-+h)               h = t s / (m sqrt n)
    mean of values in [a, b]              logit of p = (m - a) / (b - a)
                                                                        h = t s / ((b - a) p (1 - p) sqrt n)
    paired ratio of positives y / x       log: y / x exp(-+h)           s: of y_i / y - x_i / x
    paired difference y - x               log of the larger, say y: y exp(-+h) - x
                                                                        s: of (y_i - x_i) / y
    perplexity                            log of what is above 1
    ratios of times                       log, of their geometric mean
    share of items                        Wilson's score interval, or Clopper and Pearson's
    median                                order statistics, without any assumption

m: mean, s: standard deviation of the n values, t: Student's quantile with n - 1 degrees of freedom. The
values are of units that are nearly independent: windows, prompts, rounds; never of tokens, whose neighbours
depend on each other. `benchmarks/coverage.py` measures how often the intervals hold the truth.

There is no interval (None) for fewer than FEWEST values: with two, t is 12.7 and an end is 9 standard
deviations away, with three it is 2.5. Nor for values that are all equal, which say nothing of the spread of
others, or that are not finite. Only of two that are equal on every unit, the difference is 0 without more.

Of tasks: two models answer the same items, and only the items where just one of them is right (the
*discordant* ones) say which is better. Let b be those that the first alone gets right, c those that the
second alone does, of n items:

    McNemar     b given b + c is Binomial(b + c, 1/2) where the models are equally good; exact, two-sided
                (McNemar 1947, Psychometrika 12:153)
    difference  (c - b) / n, with Tango's score interval: all values that the score test with the rest of the
                model at its constrained maximum likelihood does not reject (Tango 1998, Stat. Med. 17:891)
    Holm        the k-th smallest of m p-values times m - k + 1, made monotone (Holm 1979, Scand. J. Stat.
                6:65)

Sources: delta method: Oehlert 1992, Am. Stat. 46:27. Jackknife: Efron and Stein 1981, Ann. Stat. 9:586.
Wilson 1927, JASA 22:209. Clopper and Pearson 1934, Biometrika 26:404. Median: Thompson 1936, Ann. Math.
Stat. 7:122.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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
    """A value, and how it depends on each of n units: its error is nearly the mean of `parts` less what they
    are expected to be. Of a mean, these are the values themselves."""

    value: float
    parts: Float64[np.ndarray, " n"]


def mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of values, as an estimate."""
    parts = np.asarray(values, dtype=np.float64)
    return Estimate(float(parts.mean()), parts)


def exp_mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """exp of the mean, as a perplexity is of losses; infinite where a float cannot hold it."""
    mean, parts = mean_of(values)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.exp(mean)
        return Estimate(float(value), value * (parts - mean))


def jackknife_of(value: float, without: Sequence[float]) -> Estimate:
    """Any statistic of n units, given what it is without each of them in turn."""
    left_out = np.asarray(without, dtype=np.float64)
    return Estimate(value, (len(left_out) - 1) * (left_out.mean() - left_out))


def standard_error(parts: np.ndarray) -> float | None:
    """Of the mean of the parts; None where they say nothing of it."""
    if len(parts) < FEWEST or not np.isfinite(parts).all():
        return None
    scale = float(np.abs(parts).max())  # squares of what is very large or small are beyond a float
    if parts.max() / 2 - parts.min() / 2 <= ROUNDING * scale:
        return None
    return float((parts / scale).std(ddof=1)) * scale / len(parts) ** 0.5


def student_interval(estimate: Estimate, level: float = LEVEL) -> Interval:
    """Of what has no bounds."""
    reach = _reach(estimate.parts, 1.0, level)
    return None if reach is None else _finite(estimate.value - reach, estimate.value + reach)


def log_interval(estimate: Estimate, level: float = LEVEL) -> Interval:
    """Of what is above 0."""
    reach = _reach(estimate.parts, estimate.value, level)
    return None if reach is None else _finite(*(estimate.value * _exp(sign * reach) for sign in (-1, 1)))


def logit_interval(estimate: Estimate, low: float = 0.0, high: float = 1.0, level: float = LEVEL) -> Interval:
    """Of what lies between `low` and `high`; None where the estimate is one of them."""
    width = high - low
    share = (estimate.value - low) / width if width > 0 else 0.0
    reach = _reach(estimate.parts, width * share * (1 - share), level)
    if reach is None:
        return None
    # 1 / (1 + exp(-logit)) of logit p -+ h
    ends = (share / (share + (1 - share) * _exp(sign * reach)) for sign in (1, -1))
    return _finite(*(low + width * end for end in ends))


def log_ratio_interval(first: Estimate, second: Estimate, level: float = LEVEL) -> Interval:
    """Of second / first, both above 0, of the same units; 1 where they are equal on each."""
    if _are_equal(first, second):
        return 1.0, 1.0
    if not (_is_positive(first.value) and _is_positive(second.value)):
        return None
    ratio = second.value / first.value
    return log_interval(
        Estimate(ratio, ratio * (second.parts / second.value - first.parts / first.value)), level
    )


def log_difference_interval(first: Estimate, second: Estimate, level: float = LEVEL) -> Interval:
    """Of second - first, both above 0, of the same units: above -first where the second is the larger, below
    the second where it is not; 0 where they are equal on each unit."""
    if _are_equal(first, second):
        return 0.0, 0.0
    if second.value < first.value:
        turned = log_difference_interval(second, first, level)
        return None if turned is None else (-turned[1], -turned[0])
    ends = log_interval(Estimate(second.value, second.parts - first.parts), level)
    return None if ends is None else (ends[0] - first.value, ends[1] - first.value)


def visible_difference(first: Estimate, second: Estimate, alpha: float = ALPHA) -> float | None:
    """The smallest true difference that an interval at 1 - alpha would tell from 0 with probability POWER,
    where the spread is that of these units: (t of 1 - alpha / 2 + t of POWER) standard errors. None where
    they say nothing of their spread."""
    error = standard_error(second.parts - first.parts)
    if error is None:
        return None
    freedom = len(first.parts) - 1
    return float(stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(POWER, freedom)) * error


def geometric_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Of the geometric mean of positive values, such as ratios of times."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = student_interval(mean_of(np.log(values)), level)
    return None if ends is None else _finite(*map(_exp, ends))


def median_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Of the median: the k-th smallest to the k-th largest value, k the largest for which that holds it at
    `level`. None for fewer values than that takes: 6 at 95 %."""
    ordered, tail = np.sort(np.asarray(values, dtype=np.float64)), (1 - level) / 2
    ranks = np.arange(len(ordered) // 2 + 1)
    k = int(np.count_nonzero(stats.binom.cdf(ranks, len(ordered), 0.5) <= tail))
    if k == 0 or not np.isfinite(ordered).all():
        return None
    return float(ordered[k - 1]), float(ordered[-k])


def wilson_interval(share: float, items: float, level: float = LEVEL) -> tuple[float, float]:
    """Of a share of `items`."""
    z = float(stats.norm.ppf((1 + level) / 2))
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * np.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2)
    low = 0.0 if share == 0 else max(float(middle - half), 0.0)
    return low, 1.0 if share == 1 else min(float(middle + half), 1.0)


def clopper_pearson_interval(count: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Of a share: all that a two-sided exact test does not reject, hence never too narrow."""
    found = stats.binomtest(count, items).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def _reach(parts: np.ndarray, slope: float, level: float) -> float | None:
    """How far an interval reaches on its scale, whose unit is worth `slope` at the estimate."""
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
    """None where an end is beyond a float: the values say next to nothing."""
    return (low, high) if np.isfinite(low) and np.isfinite(high) else None


def accuracy_interval(right: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of the share of `items` that are right."""
    if not 0 <= right <= items or items < 1:
        raise BitassayError(f"{right} right of {items} items is no accuracy", "at least one item")
    return wilson_interval(right / items, items, level)


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same items: `first_only` items that only the first gets right, `second_only` that
    only the second does. `difference` is the second's accuracy less the first's, a fraction; `interval` is
    95 %; `p_value` is McNemar's; `visible_difference` is what `smallest_difference` says of as many
    discordant items."""

    items: int
    first_only: int
    second_only: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    visible_difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], level: float = 0.95, alpha: float = ALPHA
) -> PairedDifference:
    """Compare two models by which items each gets right: the interval at `level`, the smallest difference
    that a test at `alpha` would show. Raises BitassayError where they did not answer equally many, or
    none."""
    if len(first) != len(second) or not len(first):
        raise BitassayError(
            f"{len(first)} items beside {len(second)} cannot be paired", "compare models on the same items"
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
    """The exact two-sided p-value of McNemar's test; 1 without discordant items."""
    discordant = first_only + second_only
    return float(stats.binomtest(first_only, discordant).pvalue) if discordant else 1.0


def difference_interval(gained: int, lost: int, items: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (gained - lost) / items, where of `items` pairs `gained` changed from wrong
    to right and `lost` the other way; within [-1, 1]."""
    z = float(stats.norm.ppf((1 + level) / 2))
    estimate = (gained - lost) / items
    return (
        -1.0 if estimate == -1 else _score_root(gained, lost, items, z, -1.0, estimate),
        1.0 if estimate == 1 else _score_root(gained, lost, items, -z, estimate, 1.0),
    )


def _score_root(gained: int, lost: int, items: int, z: float, low: float, high: float) -> float:
    """Where Tango's statistic, which falls with the difference, passes `z` between `low` and `high`."""
    inside = 1e-12  # at -1 and 1 the statistic is 0 / 0, or infinite

    def excess(delta: float) -> float:
        return _score(gained, lost, items, delta) - z

    low, high = max(low, -1 + inside), min(high, 1 - inside)
    if excess(low) <= 0:
        return max(-1.0, low)
    if excess(high) >= 0:
        return min(1.0, high)
    return float(optimize.brentq(excess, low, high, xtol=1e-12))  # type: ignore[arg-type]


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
    """p-values adjusted for so many comparisons, in the order given; at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_difference(items: int, discordant: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true difference of accuracies that `items` items would show, a fraction (above 1: none).

    Definition: two models that disagree on `discordant` of the items; the difference at which the exact
    two-sided McNemar test at level `alpha` rejects with probability `power`. Where that many disagreements
    could never reject (fewer than 6 at 5 %), it is counted with as many as can.
    """
    fewest = int(np.ceil(np.log2(2 / alpha)))  # all in one direction: p = 2 / 2^m
    m = max(discordant, fewest)
    while True:
        largest_low = -1  # reject where one side has at most so many
        while 2 * stats.binom.cdf(largest_low + 1, m, 0.5) <= alpha:
            largest_low += 1
        if largest_low >= 0:
            break
        m += 1

    def lacks(share: float) -> float:
        """By how much power is short where the better model wins so large a share of disagreements."""
        wins = stats.binom.sf(m - largest_low - 1, m, share) + stats.binom.cdf(largest_low, m, share)
        return float(wins) - power

    share = float(optimize.brentq(lacks, 0.5, 1.0))  # type: ignore[arg-type]
    return (2 * share - 1) * m / items

"""Intervals and tests.

Of texts: the unit that is resampled is the window: neighbouring tokens are not independent, windows nearly
are. Of tasks: two models answer the same items, and only the items where just one of them is right (the
*discordant* ones) say which is better. Let b be those that the first alone gets right, c those that the
second alone does, of n items:

    McNemar     b given b + c is Binomial(b + c, 1/2) where the models are equally good; exact, two-sided
                (McNemar 1947, Psychometrika 12:153)
    difference  (c - b) / n, with Tango's score interval: all values that the score test with the rest of the
                model at its constrained maximum likelihood does not reject (Tango 1998, Stat. Med. 17:891)
    Holm        the k-th smallest of m p-values times m - k + 1, made monotone (Holm 1979, Scand. J. Stat.
    6:65)

An accuracy alone has Wilson's score interval (Wilson 1927, JASA 22:209).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from bitassay.errors import BitassayError

RESAMPLES = 10_000
FEWEST = 5  # resamples in a tail
ALPHA = 0.05
POWER = 0.8


def bootstrap_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of `values` [..., windows] over resampled windows: [..., RESAMPLES]. Equal seeds resample
    equally, so that differences of two results are paired."""
    count = values.shape[-1]
    picks = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return values.astype(np.float64) @ (picks.T / count)


def percentile_interval(
    resampled: np.ndarray, windows: int, level: float = 0.95
) -> tuple[float, float] | None:
    """The expanded percentile interval of a bootstrap distribution; None for a single window, which says
    nothing of spread.

    A plain percentile interval is too narrow for few windows, by sqrt((n - 1) / n) and by using normal
    instead of t quantiles; the tails are widened to make up for both (Hesterberg 2015, arXiv 1411.5279,
    section 5.3). Where so thin a tail is beyond the rarest resample, n times the same window, or holds fewer
    than FEWEST of those drawn, the interval is Student's, of the bootstrap's standard error.
    """
    if windows < 2:
        return None
    widened = np.sqrt(windows / (windows - 1)) * stats.t.ppf((1 - level) / 2, windows - 1)
    tail = stats.norm.cdf(widened)
    if tail < max(float(windows) ** -windows, FEWEST / len(resampled)):
        centre, reach = float(resampled.mean()), -float(widened * resampled.std())
        return centre - reach, centre + reach
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def accuracy_interval(right: int, items: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the share of `items` that are right."""
    if not 0 <= right <= items or items < 1:
        raise BitassayError(f"{right} right of {items} items is no accuracy", "at least one item")
    found = stats.binomtest(right, items).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


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

"""How well a score tells attacked sequences from honest ones, by ranks alone.

For honest scores h_1 .. h_n and attacked ones a_1 .. a_m, larger meaning less honest:

    AUC        = share of pairs with a > h, ties counting half
    TPR        = share of attacked sequences above the conformal threshold (`scores.threshold`)

Intervals. TPR: Clopper-Pearson, given the threshold. AUC: its variance is at most A (1 - A) / min(m, n)
(Birnbaum and Klose 1957), so Wilson's interval for a share of min(m, n) covers it; unlike the intervals of
DeLong and of the bootstrap it does not shrink to a point where no pair is out of order, which is the common
case here. It is wider than they are elsewhere.

Left out: the spread of the threshold over honest samples. The interval of a TPR is that of this threshold.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import clopper_pearson_interval, wilson_interval
from bitassay.verification.scores import threshold


class Rate(NamedTuple):
    """An estimate and its two-sided interval."""

    value: float
    low: float
    high: float


def auc(honest: Float64[np.ndarray, " n"], attacked: Float64[np.ndarray, " m"], level: float = 0.95) -> Rate:
    """Return the chance that an attacked sequence scores higher than an honest one, ties counting half.

    Raises BitassayError where either is empty or holds NaN.
    """
    _check(honest, attacked)
    ordered = np.sort(honest)
    below, up_to = (np.searchsorted(ordered, attacked, side=side) for side in ("left", "right"))
    value = float((below + up_to).mean() / 2 / len(honest))
    pairs = min(len(honest), len(attacked))
    return Rate(value, *wilson_interval(value * pairs, pairs, level))


def tpr_at_fpr(
    honest: Float64[np.ndarray, " n"],
    attacked: Float64[np.ndarray, " m"],
    fpr: float = 0.01,
    level: float = 0.95,
) -> Rate:
    """Return the share of attacked sequences that are refused at the conformal threshold.

    Raises BitassayError where either is empty or holds NaN.
    """
    _check(honest, attacked)
    refused = int((attacked > threshold(honest, fpr)).sum())
    return share(refused, len(attacked), level)


def tokens_to(rates: Mapping[int, float], target: float = 0.99) -> int | None:
    """Return the smallest number of tokens from which on the TPR stays at the target or above it, given the
    TPR for each number of tokens; None where the largest number does not reach it.

    The TPR is the estimate, not the lower end of its interval, which reaches 0.99 with 368 attacked sequences
    and no miss.
    """
    reached = None
    for tokens in sorted(rates, reverse=True):
        if rates[tokens] < target:
            break
        reached = tokens
    return reached


def share(count: int, of: int, level: float = 0.95) -> Rate:
    """Return count / of with the Clopper-Pearson interval."""
    return Rate(count / of, *clopper_pearson_interval(count, of, level))


def _check(honest: np.ndarray, attacked: np.ndarray) -> None:
    for name, scores in (("honest", honest), ("attacked", attacked)):
        if not len(scores):
            raise BitassayError(f"there are no {name} scores")
        if np.isnan(scores).any():
            raise BitassayError(f"{int(np.isnan(scores).sum())} of {len(scores)} {name} scores are NaN")

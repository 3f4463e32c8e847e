"""How well a score tells attacked sequences from honest ones, by ranks alone.

For honest scores h_1 .. h_n and attacked ones a_1 .. a_m, larger meaning less honest:

    AUC        = share of pairs with a > h, ties counting half
    threshold  = the ceil((n + 1)(1 - FPR))-th smallest honest score; a sequence above it is refused
    TPR        = share of attacked sequences above the threshold

The threshold is that of split conformal prediction, the same as refusing where (1 + #{h >= s}) / (n + 1) <=
FPR: one more honest sequence is above it with a probability of at most the FPR, whatever the distribution.
A quantile between two scores would lie lower and give no such bound. With fewer than 1 / FPR - 1 honest
scores there is no such score; the threshold is infinite, and nothing is detected.

Intervals. TPR: Clopper-Pearson, given the threshold. AUC: its variance is at most A (1 - A) / min(m, n)
(Birnbaum and Klose 1957), so Wilson's interval for a share of min(m, n) covers it; unlike the intervals of
DeLong and of the bootstrap it does not shrink to a point where no pair is out of order, which is the common
case here. It is wider than they are elsewhere.

Left out: the spread of the threshold over honest samples. The interval of a TPR is that of this threshold.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import clopper_pearson_interval, wilson_interval


class Rate(NamedTuple):
    """An estimate and its two-sided interval."""

    value: float
    low: float
    high: float


def auc(honest: Float64[np.ndarray, " n"], attacked: Float64[np.ndarray, " m"], level: float = 0.95) -> Rate:
    """The chance that an attacked sequence scores higher than an honest one, ties counting half.

    Raises BitassayError where either is empty or holds NaN.
    """
    _check(honest, attacked)
    ordered = np.sort(honest)
    below, up_to = (np.searchsorted(ordered, attacked, side=side) for side in ("left", "right"))
    value = float((below + up_to).mean() / 2 / len(honest))
    pairs = min(len(honest), len(attacked))
    return Rate(value, *wilson_interval(value * pairs, pairs, level))


def threshold(honest: Float64[np.ndarray, " n"], fpr: float) -> float:
    """The score above which a sequence is refused; infinite where there are too few honest scores."""
    if not 0 < fpr < 1:
        raise BitassayError(f"a false-positive rate of {fpr} is not between 0 and 1", "0.01")
    rank = max(math.ceil((len(honest) + 1) * (1 - fpr) - 1e-9), 1)
    return float(np.sort(honest)[rank - 1]) if rank <= len(honest) else math.inf


def tpr_at_fpr(
    honest: Float64[np.ndarray, " n"],
    attacked: Float64[np.ndarray, " m"],
    fpr: float = 0.01,
    level: float = 0.95,
) -> Rate:
    """The share of attacked sequences that are refused at the conformal threshold.

    Raises BitassayError where either is empty or holds NaN.
    """
    _check(honest, attacked)
    refused = int((attacked > threshold(honest, fpr)).sum())
    return share(refused, len(attacked), level)


def tokens_to(rates: Mapping[int, float], target: float = 0.99) -> int | None:
    """The smallest number of tokens from which on the TPR stays at the target or above it, given the TPR for
    each number of tokens; None where the largest number does not reach it.

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
    """count / of with the Clopper-Pearson interval."""
    return Rate(count / of, *clopper_pearson_interval(count, of, level))


def _check(honest: np.ndarray, attacked: np.ndarray) -> None:
    for name, scores in (("honest", honest), ("attacked", attacked)):
        if not len(scores):
            raise BitassayError(f"there are no {name} scores")
        if np.isnan(scores).any():
            raise BitassayError(f"{int(np.isnan(scores).sum())} of {len(scores)} {name} scores are NaN")

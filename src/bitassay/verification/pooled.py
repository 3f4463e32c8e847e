"""One decision about many traces of the same host.

The p-values of several traces count the same honest scores, so they are not independent and Fisher's method
does not hold. But under honesty all n calibration scores and k new ones are exchangeable, and then the
p-values say everything that matters: p_i (n + 1) - 1 is the number of honest scores at least as bad as trace
i. Their sum U is the Mann-Whitney statistic (Mann and Whitney 1947), whose exact distribution under
exchangeability is known,

    P(U = u) = coefficient of q^u in the Gaussian binomial [n + k choose k] / C(n + k, k),

and a small U says that the new runs are farther off than the honest ones. Ties were counted against
rejection, so the p-value P(U <= u) is valid with them. Traces of different limits (see `profile.py`) were
ranked among different honest scores: each limit gets its own U, and the smallest p-value times the number of
limits is the answer (Bonferroni). A host that cheats rarely moves U little but fails more often than others:
of how many traces fail alone the distribution is known as well (`fail_count_p_value`). Both need traces of
different prompts (`accounting.py`). Compare Bates et al. 2023 ("Testing for outliers with
conformal p-values"), who show how far conformal p-values are from independent.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import comb, floor
from typing import Any

from bitassay.errors import BitassayError
from bitassay.verification.profile import ALPHA
from bitassay.verification.structure import Reason, Status
from bitassay.verification.verdict import Verdict


@dataclass(frozen=True)
class PooledVerdict:
    """counts: verdicts by status. n_pooled: traces whose p-values were pooled."""

    status: Status
    reasons: tuple[Reason, ...]
    counts: dict[str, int]
    n_pooled: int
    p_value: float | None
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.status}: {'; '.join(reason.sentence for reason in self.reasons)}"


def pooled_verdict(verdicts: Sequence[Verdict], alpha: float = ALPHA) -> PooledVerdict:
    """Return whether all traces together are those of an honest host, at a false-positive rate of at most
    `alpha` for the whole set.

    verdicts: of different prompts. A single structural FAIL fails the set. Traces without a p-value (too
    short, say) are left out; with none left the answer is INCONCLUSIVE. Raises BitassayError for no verdicts,
    or for p-values of different profiles.
    """
    if not verdicts:
        raise BitassayError("there are no verdicts to pool")
    by_limit, n = _by_limit(verdicts)
    n_pooled, p_value = sum(map(len, by_limit.values())), None
    if by_limit:
        p_value = min(1.0, len(by_limit) * min(pooled_p_value(alike, n) for alike in by_limit.values()))
    failing = sum(verdict.status == "FAIL" for verdict in verdicts)
    structural = [reason for verdict in verdicts for reason in verdict.structural]
    if structural:
        status, reasons = "FAIL", structural
    elif p_value is None:
        status, reasons = "INCONCLUSIVE", [reason for verdict in verdicts for reason in verdict.reasons]
    else:
        sentence = f"{failing} of {n_pooled} traces fail alone; as a set p = {p_value:.2g} under honesty"
        status, code = ("FAIL", "pooled-too-far") if p_value <= alpha else ("PASS", "as-honest")
        reasons = [Reason(code, sentence)]
    counts = dict(Counter(verdict.status for verdict in verdicts))
    return PooledVerdict(status, tuple(dict.fromkeys(reasons)), counts, n_pooled, p_value, alpha)


def fail_count_p_value(verdicts: Sequence[Verdict], alpha: float) -> float:
    """Return the p-value of how many of the verdicts have a p-value of at most `alpha`, if the host is
    honest; 1 without any. Raises as `pooled_verdict` does for different profiles.

    A trace of p <= alpha has fewer than m = floor(alpha (n + 1)) honest scores that are as bad. That f of k
    traces do means that of the f + m - 1 worst of all n + k scores at least f are theirs, and how many are is
    hypergeometric under exchangeability. Each limit counts for itself (Bonferroni).
    """
    by_limit, n = _by_limit(verdicts)
    p_values = [fail_count(alike, n, alpha) for alike in by_limit.values()]
    return min(1.0, max(len(p_values), 1) * min(p_values, default=1.0))


def fail_count(p_values: Sequence[float], n: int, alpha: float) -> float:
    """Return the p-value of how many of the conformal `p_values` against the same `n` honest scores are at
    most `alpha`."""
    f, k, m = sum(p <= alpha for p in p_values), len(p_values), floor(alpha * (n + 1) + 1e-9)
    if not f:
        return 1.0
    worst = f + m - 1
    return sum(comb(k, x) * comb(n, worst - x) for x in range(f, min(k, worst) + 1)) / comb(n + k, worst)


def _by_limit(verdicts: Sequence[Verdict]) -> tuple[dict[int | None, list[float]], int]:
    """P-values by limit, and of how many honest scores. Raises BitassayError for several profiles."""
    by_limit: dict[int | None, list[float]] = {}
    for verdict in verdicts:
        if verdict.p_value is not None:
            by_limit.setdefault(verdict.limit, []).append(verdict.p_value)
    calibrations = {(verdict.profile, verdict.n_calibration or 0) for verdict in verdicts if verdict.profile}
    if len(calibrations) > 1:
        raise BitassayError(
            "the verdicts come from different profiles", "pool traces of one model and one pair of numerics"
        )
    return by_limit, next((n for _, n in calibrations), 0)


def pooled_p_value(p_values: Sequence[float], n: int) -> float:
    """Return P(U <= u) for conformal p-values against the same `n` honest scores."""
    U = sum(round(p * (n + 1)) - 1 for p in p_values)
    counts = mann_whitney_counts(len(p_values), n)
    return sum(counts[: U + 1]) / comb(n + len(p_values), n)


@lru_cache(maxsize=16)
def mann_whitney_counts(k: int, n: int) -> Sequence[int]:
    """Return in how many of the C(n + k, k) orders of k new and n honest scores U is 0, 1, ..., k n: the
    Gaussian binomial's coefficients.

    [n + k choose k] is the product over i = 1 .. k of (1 - q^(n + i)) / (1 - q^i); integers throughout.
    """
    counts = [1] + [0] * (k * n)
    for i in range(1, k + 1):
        for u in range(len(counts) - 1, n + i - 1, -1):
            counts[u] -= counts[u - n - i]
        for u in range(i, len(counts)):
            counts[u] += counts[u - i]
    return counts

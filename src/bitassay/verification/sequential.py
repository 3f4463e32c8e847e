"""Evidence over many requests of one host, looked at after each, with a bounded false-accusation rate for
ever.

The p-values of many requests against one profile count the same n honest scores, so they are not independent:
one profile with unluckily low scores would accuse every honest host in time. The *rank* of each new score
among all earlier ones, honest scores and requests alike, is independent of everything before, as long as all
are exchangeable (Vovk, Nouretdinov and Gammerman 2003, "Testing exchangeability on-line"). A capital that
bets on these ranks at fair odds is a conformal test martingale: it starts at 1, and whenever one looks,
however often, and wherever one stops (Ville 1939),

    P(the capital ever reaches 1 / alpha) <= alpha.

The bet here is the likelihood ratio of the whole order of the n + k scores, under "the requests are of
another kind" against "all orders are equally likely". The other kind is a Lehmann alternative, P(request >
s) = P(honest > s)^delta with delta < 1, for which the order has a closed form (Savage 1956; as a sequential
test: Savage and Sethuraman 1966). With items from the smallest score to the largest, of weight w_i = delta
for a request and 1 for an honest score, and N = n + k,

    LR = product over i of w_i (N - i + 1) / (w_i + ... + w_N)

which for delta -> 0 and every request above every honest score is C(n + k, k), all the evidence that ranks
can give.

delta is not known, nor when a host begins to cheat. The capital is split, which keeps it a martingale:
evenly over delta = 1/2, 1/4, ..., 1/256, and over the request from which on delta holds, half of it on the
first and 1 / (2 j (j + 1)) on the j-th of the later starts, which grow sparser (eight to an octave). A bet
that has not begun is kept as it is. Requests before a start count as honest scores. Ties are broken against
the alarm, so nothing is random.

Power at alpha = 0.01, for normal scores of which an attack shifts the mean by so many standard deviations:
the median number of requests until the alarm, over 200 simulated hosts that cheat from the first request on
(the tests repeat it with fewer).

    shift (AUC)    1 (.76)    2 (.92)    3 (.98)
    n = 20         > 60 (*)   6          3
    n = 50         23         5          2
    n = 100        19         4          2          (*) 48 % of the hosts within 60 requests

Requests of different limits (see `profile.py`) are ranked among different honest scores, and there is no
order of all of them. Each limit plays its own game, with the share 1 / (g (g + 1)) of alpha for the g-th to
appear; the shares sum to at most 1, so by the union bound the promise holds for all games together. The
first costs a factor of 2 that way, and whoever asks every time for another length learns little.

Left out: the bound is an average over calibration sets; for one given set it may be larger. It needs
exchangeable scores: requests like the calibration prompts, chosen before their scores are known. A weak
attack may need more honest scores rather than more requests. The cost grows as k^2 (n + k); where the capital
so far is known, that of one more request as k + n times the number of starts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from bitassay.errors import BitassayError

DELTAS = 2.0 ** -np.arange(1, 9)
STARTS_PER_OCTAVE = 8


@dataclass(frozen=True)
class SequentialEvidence:
    """What `n_requests` prove together. log_wealth: after the last. p_value: the smallest alpha at which
    there has been an alarm. alarm_at: the request, counted from 1, at which it came for this alpha."""

    n_requests: int
    log_wealth: float
    p_value: float
    alarm_at: int | None
    alpha: float

    @classmethod
    def of(cls, wealth: Float64[np.ndarray, " k"], alpha: float) -> "SequentialEvidence":
        last = float(wealth[-1]) if len(wealth) else 0.0
        return cls(len(wealth), last, anytime_p_value(wealth), alarm_at(wealth, alpha), alpha)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        outcome = f"alarm at request {self.alarm_at}" if self.alarm_at else "no alarm"
        return f"{outcome} of {self.n_requests}; anytime p {self.p_value:.2g}, alpha {self.alpha:g}"


def wealth_by_limit(
    scores: Float64[np.ndarray, " k"],
    limits: Sequence[int],
    honest: Callable[[int], Float64[np.ndarray, " n"]],
    known: Sequence[float] = (),
) -> Float64[np.ndarray, " k"]:
    """Return the log capital, in its limit's game, after each of the requests; honest(limit): the profile's
    scores for a limit. known: what was found for the first of them."""
    wealth = np.array([*known, *[0.0] * (len(scores) - len(known))])
    for game, limit in enumerate(dict.fromkeys(limits), 1):
        indices = np.flatnonzero(np.array(limits) == limit)
        new = indices[indices >= len(known)]
        share = -math.log(game * (game + 1))
        if len(new):
            wealth[new] = share + log_wealth(scores[indices], honest(limit), after=len(indices) - len(new))
    return wealth


def log_wealth(
    scores: Float64[np.ndarray, " k"], honest: Float64[np.ndarray, " n"], after: int = 0
) -> Float64[np.ndarray, " looks"]:
    """Return the log capital after each of the requests' `scores` but the first `after`, in their order,
    given the `honest` scores of a profile; larger scores are less honest. What comes later never changes what
    was before.

    Raises BitassayError for NaN, or without honest scores.
    """
    if not len(honest):
        raise BitassayError("there are no honest scores to rank the requests among")
    if np.isnan(scores).any() or np.isnan(honest).any():
        raise BitassayError("scores of requests and honest scores must not be NaN")
    everything, begins = np.concatenate([honest, scores]), starts(len(scores))
    weights = start_weights(len(begins))
    wealth = np.zeros(len(scores) - after)
    for k in range(after + 1, len(scores) + 1):
        items = np.arange(len(honest) + k)
        order = np.lexsort((-items, everything[: len(items)]))
        begun = begins < k
        ratios = log_ratios(order >= len(honest) + begins[begun, None])
        kept = np.log1p(-weights[begun].sum())
        wealth[k - after - 1] = np.logaddexp.reduce(np.append(np.log(weights[begun]) + ratios, kept))
    return wealth


def alarm_at(wealth: Float64[np.ndarray, " k"], alpha: float = 0.01) -> int | None:
    """Return after how many requests the capital first reaches 1 / alpha; None where it never does. An honest
    host ever gets here with a probability of at most `alpha`."""
    if not 0 < alpha < 1:
        raise BitassayError(f"alpha {alpha} is not between 0 and 1", "0.01")
    reached = np.flatnonzero(wealth >= -math.log(alpha))
    return int(reached[0]) + 1 if len(reached) else None


def anytime_p_value(wealth: Float64[np.ndarray, " k"]) -> float:
    """Return the smallest alpha at which there has been an alarm; 1 where the capital never grew."""
    return math.exp(-max(float(wealth.max(initial=0.0)), 0.0))


def starts(k: int) -> Int64[np.ndarray, " starts"]:
    """Return how many requests go before each start, below `k`: all up to STARTS_PER_OCTAVE, then so many to
    a doubling."""
    each = np.arange(k)
    octave = np.maximum(np.log2(np.maximum(each, 1) / STARTS_PER_OCTAVE).astype(np.int64), 0)
    return each[each % 2**octave == 0]


def start_weights(count: int) -> Float64[np.ndarray, " starts"]:
    """Return the shares of the capital; over all starts that there will ever be they sum to 1."""
    later = np.arange(1.0, count)
    return np.append(0.5, 0.5 / (later * (later + 1)))[:count]


def log_ratios(requests: np.ndarray) -> Float64[np.ndarray, " starts"]:
    """Return log LR, averaged over DELTAS, of orders from the smallest score to the largest that say what is
    a request: bool [starts, N]."""
    total = np.arange(requests.shape[-1], 0, -1)
    left = np.cumsum(requests[:, ::-1], axis=-1)[:, ::-1]  # requests from here on
    weights = total - left + DELTAS[:, None, None] * left
    by_delta = np.log(DELTAS)[:, None] * requests.sum(-1) - np.log(weights / total).sum(-1)
    return np.logaddexp.reduce(by_delta, axis=0) - math.log(len(DELTAS))

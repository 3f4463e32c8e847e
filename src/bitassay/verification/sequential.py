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

Requests that cannot be scored have no rank. `rate_wealth` bets on how many they are: under "each is undecided
with a probability of at most r, whatever was before", a bet of the likelihood ratio of a rate q > r is fair
or worse, and the capital is split over q and over starts as above.

Left out: the bound is an average over calibration sets; for one given set it may be larger. It needs
exchangeable scores: requests like the calibration prompts, all of them different, chosen before their scores
are known. A weak attack may need more honest scores rather than more requests. One look costs as much as
starts times n + k, so a ledger is looked at after each of the first 256 requests, then 128 times to a
doubling: an alarm comes at most 0.8 % of the requests late, and looking less often keeps the promise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from bitassay.errors import BitassayError

DELTAS = 2.0 ** -np.arange(1, 9)
STARTS_PER_OCTAVE = 8
LOOKS_PER_OCTAVE = 128
RATES = np.array([1, 2, 4, 8, 12, 15]) / 16  # between the rate that is allowed (0) and 1
FACTORS = 64  # multiplied before their logarithm is taken: DELTAS.min() ** 64 is not yet 0


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
) -> Float64[np.ndarray, " k"]:
    """Return the log capital, in its limit's game, at the last of `looks` after each of the requests;
    honest(limit): the profile's scores for a limit."""
    wealth = np.zeros(len(scores))
    for game, limit in enumerate(dict.fromkeys(limits), 1):
        indices = np.flatnonzero(np.array(limits) == limit)
        seen = looks(len(indices))
        found = log_wealth(scores[indices], honest(limit), seen)
        last = np.searchsorted(seen, np.arange(1, len(indices) + 1), side="right") - 1
        wealth[indices] = found[last] - math.log(game * (game + 1))
    return wealth


def log_wealth(
    scores: Float64[np.ndarray, " k"],
    honest: Float64[np.ndarray, " n"],
    looks: Int64[np.ndarray, " looks"] | None = None,
) -> Float64[np.ndarray, " looks"]:
    """Return the log capital after so many requests as each of `looks` says (default: after each), given the
    `scores` of the requests in their order and the `honest` scores of a profile; larger scores are less
    honest. What comes later never changes what was before.

    Raises BitassayError for NaN, or without honest scores.
    """
    if not len(honest):
        raise BitassayError("there are no honest scores to rank the requests among")
    if np.isnan(scores).any() or np.isnan(honest).any():
        raise BitassayError("scores of requests and honest scores must not be NaN")
    looks = np.arange(1, len(scores) + 1) if looks is None else looks
    everything, begins = np.concatenate([honest, scores]), starts(len(scores))
    weights = start_weights(len(begins))
    wealth = np.zeros(len(looks))
    for look, k in enumerate(looks):
        items = np.arange(len(honest) + k)
        order = np.lexsort((-items, everything[: len(items)]))
        begun = begins < k
        ratios = log_ratios(order >= len(honest) + begins[begun, None])
        kept = np.log1p(-weights[begun].sum())
        wealth[look] = np.logaddexp.reduce(np.append(np.log(weights[begun]) + ratios, kept))
    return wealth


def rate_wealth(happened: Bool[np.ndarray, " k"], rate: float) -> Float64[np.ndarray, " k"]:
    """Return the log capital after each of k chances for something to happen, of a player who bets that it
    happens more often than `rate`. Raises BitassayError for a rate that is not between 0 and 1."""
    if not 0 < rate < 1:
        raise BitassayError(f"a rate of {rate} is not between 0 and 1", "0.1")
    if not len(happened):
        return np.zeros(0)
    larger = (rate + (1 - rate) * RATES)[:, None]
    steps = np.where(happened, np.log(larger / rate), np.log((1 - larger) / (1 - rate)))
    gains = np.concatenate([np.zeros((len(RATES), 1)), np.cumsum(steps, axis=1)], axis=1)
    begins, after = starts(len(happened)), np.arange(1, len(happened) + 1)
    weights = start_weights(len(begins))
    begun = begins[:, None] < after
    since = np.logaddexp.reduce(gains[:, None, 1:] - gains[:, begins, None], axis=0) - math.log(len(RATES))
    bets = np.where(begun, since + np.log(weights)[:, None], -np.inf)
    kept = np.log1p(-(weights[:, None] * begun).sum(0))
    return np.logaddexp(np.logaddexp.reduce(bets, axis=0), kept)


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
    """Return how many requests go before each start, below `k`: all up to twice STARTS_PER_OCTAVE, then so
    many to a doubling."""
    return _sparser(np.arange(k), STARTS_PER_OCTAVE)


def looks(k: int) -> Int64[np.ndarray, " looks"]:
    """Return after how many of `k` requests a ledger is looked at: each of the first, then LOOKS_PER_OCTAVE
    to a doubling."""
    return _sparser(np.arange(1, k + 1), LOOKS_PER_OCTAVE)


def _sparser(each: Int64[np.ndarray, " k"], per_octave: int) -> Int64[np.ndarray, " kept"]:
    octave = np.maximum(np.log2(np.maximum(each, 1) / per_octave).astype(np.int64), 0)
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
    share = np.zeros((len(requests), -(-len(total) // FACTORS) * FACTORS))
    share[:, : len(total)] = left / total
    share = share.reshape(len(requests), FACTORS, -1)
    by_delta = [
        math.log(delta) * requests.sum(-1) - np.log((1 - (1 - delta) * share).prod(axis=1)).sum(-1)
        for delta in DELTAS
    ]
    return np.logaddexp.reduce(by_delta, axis=0) - math.log(len(DELTAS))

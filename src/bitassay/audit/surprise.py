"""Were sampled tokens drawn as they should have been?

A server is asked to sample at temperature T with top-p P. With r the reference's log-probabilities at that
temperature, and q those of the tokens that top-p keeps, normalised, a token x that was drawn from q has the
surprise s = -r_x, of which mean and variance are known:

    E = sum_v q_v s_v,    V = sum_v q_v s_v^2 - E^2

The statistic of an answer is

    z = sum_t (s_t - E_t) / sqrt(sum_t V_t)

over its positions, of mean 0 and variance 1 for a server that computes as the reference does. Both sides are
tested: a lower temperature draws likely tokens, a top-p that is ignored, another prompt or another model
unlikely ones. A token that top-p leaves out by more than RIM of probability has the surprise CAP, as has any
beyond it: near the rim, rounding decides.

Sampled tokens say much less than greedy ones about small changes of the weights. What they alone can tell is
how the server samples. Left out: the rank of the whole answer among samples of the reference (RUT,
2506.06975), which this replaces by moments that need no samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from bitassay.audit.distance import CAP, Rows

RIM = 0.02


@dataclass(frozen=True)
class Rule:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0


ASKED = Rule(1.0, 0.9)
Surprises = Float64[np.ndarray, " positions"]


def surprises(tokens: Sequence[int], rows: Rows, rule: Rule) -> tuple[Surprises, Surprises, Surprises]:
    """Return each token's surprise in nats, and the mean and variance that it should have. rows: the
    reference's log-probabilities behind which the tokens come."""
    found = np.zeros((3, len(tokens)))
    for at, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        s, before, q = _drawn(row, rule)
        capped = np.minimum(s, CAP)
        mean = float(q @ capped)
        own = CAP if before[token] >= rule.top_p + RIM else capped[token]
        found[:, at] = own, mean, max(float(q @ capped**2) - mean**2, 0.0)
    return found[0], found[1], found[2]


def unlikeliness(tokens: Sequence[int], rows: Rows, rule: Rule) -> Surprises:
    """Return -log of the probability that a sampler by this rule draws each token; CAP at most."""
    found = []
    for token, row in zip(tokens, rows, strict=True):
        q = _drawn(row, rule)[2][token]
        found.append(min(-np.log(q), CAP) if q else CAP)
    return np.array(found, dtype=np.float64)


def _drawn(
    row: Float64[np.ndarray, " vocabulary"], rule: Rule
) -> tuple[
    Float64[np.ndarray, " vocabulary"], Float64[np.ndarray, " vocabulary"], Float64[np.ndarray, " vocabulary"]
]:
    """Of each token: its surprise, the probability of the more likely ones, and its own by the rule."""
    scaled = row / rule.temperature
    scaled = scaled - np.logaddexp.reduce(scaled)
    p = np.exp(scaled)
    order = np.argsort(-p, kind="stable")
    before = np.empty_like(p)
    before[order] = np.cumsum(p[order]) - p[order]
    q = np.where(before < rule.top_p, p, 0.0)
    q[order[0]] = p[order[0]]
    return -scaled, before, q / q.sum()

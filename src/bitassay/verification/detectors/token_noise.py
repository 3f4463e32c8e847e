"""Claimed tokens, one by one, against the noise that honest numerics put on the logits at that position.

At each output token let z be the scores of the next higher precision (logits over the temperature, with the
sampling noise and without what top-p leaves out), o those of the verifier's own dtype, and v over the TOP
likeliest tokens:

    sigma^2 = (var_v(o_v - z_v) + its mean over the run) / 2     what rounding does to scores here
    u       = (max z - z_claimed) / sigma                        the margin in units of it
    p       = sum over v but the best of  Phi(-(max z - z_v) / (sqrt(2) sigma))     at most MOST

p is how often an honest host takes another token than z would, if its rounding error is normal and as large
as the verifier's own. Two statistics of the first n tokens:

    token-flips    sum (f - p) / sqrt(sum p (1 - p) + PRIOR)    f: 1 where the claimed token is not the best
    token-outlier  log(1 + the largest u)

The mean margin of `token_difr.py` lets a host choose at every near tie: nothing that it can do there is large
in nats. But near ties are rare and their honest rate is known, so that *how often* the second best is taken
tells, over a few requests, and a single token that rounding cannot explain tells at once.

Left out: with top-p a token on the rim of the nucleus may fall in or out by rounding, which p does not know;
profiles are calibrated for one sampler, and so absorb it.
"""

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bitassay.engines.sampling import ROWS, Draw
from bitassay.verification.detectors.detector import Comparison, Detector, Series

TOP = 20
MOST = 0.7
PRIOR = 0.05  # of one flip's variance: few tokens without a near tie must not make one flip look enormous
MOST_UNITS = 20.0


Logits = Float[Tensor, "tokens vocabulary"]
Judged = tuple[Float64[Tensor, " tokens"], Float64[Tensor, " tokens"], Float64[Tensor, " tokens"]]
_judged: "WeakKeyDictionary[Comparison, Judged]" = WeakKeyDictionary()


def margins_and_noise(comparison: Comparison) -> Judged:
    """Return u, f and p of each output token."""
    if comparison not in _judged:  # two detectors ask
        own, precise = comparison.verifier.logits, comparison.reference.logits
        _judged[comparison] = judged_by(precise, comparison, own, precise)
    return _judged[comparison]


def judged_by(logits: Logits, comparison: Comparison, own: Logits, precise: Logits) -> Judged:
    """Return u, f and p of each output token by `logits`, where rounding makes `own` of `precise`."""
    header = comparison.header
    sampler = header.sampling.to_sampler()
    draws = [Draw(header.nonce, index) for index in range(len(header.output_ids))]
    claimed = torch.tensor(header.output_ids)
    margins, best, gaps, variances = [], [], [], []
    for start in range(0, len(claimed), ROWS):
        rows = slice(start, start + ROWS)
        of_rows, scores = sampler.margins_and_scores(logits[rows], claimed[rows], draws[rows])
        found, here = scores.topk(min(TOP, scores.shape[-1])), scores.device
        rounded, unrounded = (
            side[rows].gather(1, found.indices.to(side.device)).to(here).double() for side in (own, precise)
        )
        error = (rounded - unrounded) / (sampler.temperature or 1.0)
        margins.append(of_rows)
        best.append(found.indices[:, 0].cpu())
        gaps.append((found.values[:, :1] - found.values[:, 1:]).cpu())
        variances.append(error.var(1, correction=0).nan_to_num(nan=0, posinf=0))  # none where not finite
    variance = torch.cat(variances)
    sigma = ((variance + variance.mean()) / 2).sqrt().clamp(min=torch.finfo(comparison.dtype).tiny).cpu()
    p = torch.special.ndtr(-torch.cat(gaps) / (math.sqrt(2) * sigma[:, None]))
    p = p.sum(1).nan_to_num(nan=0).clamp(max=MOST)
    units = (torch.cat(margins) / sigma).clamp(max=MOST_UNITS)
    return units, (claimed != torch.cat(best)).double(), p


def excess_flips(values: Sequence[float]) -> float:
    """Return the standardised excess of flips, from f - p of each token."""
    expected = [1 - value if value > 0 else -value for value in values]
    return sum(values) / math.sqrt(sum(p * (1 - p) for p in expected) + PRIOR)


def largest_margin(values: Sequence[float]) -> float:
    """Return log(1 + the largest of the margins): their tail is long, and one must not set the scale."""
    return math.log1p(max(values))


def check_flips(comparison: Comparison, _: Any) -> list[Series]:
    """Return f - p as one series by token."""
    _, flipped, p = margins_and_noise(comparison)
    return [Series(tuple((flipped - p).tolist()))]


def check_outlier(comparison: Comparison, _: Any) -> list[Series]:
    """Return u as one series by token."""
    return [Series(tuple(margins_and_noise(comparison)[0].tolist()))]


TOKEN_FLIPS = Detector(
    "token-flips",
    "how often claimed tokens lose near ties",
    check_flips,
    smallest_sd=0.3,
    statistic=excess_flips,
    by_token=True,
)
TOKEN_OUTLIER = Detector(
    "token-outlier",
    "the claimed token that rounding explains least",
    check_outlier,
    smallest_sd=0.2,
    statistic=largest_margin,
    by_token=True,
)

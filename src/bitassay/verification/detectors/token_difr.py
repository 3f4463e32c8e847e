"""Token-DiFR (arXiv 2511.20621): nothing is sent, and each claimed token is judged.

With the sampling noise rebuilt, `Sampler.margins` says by how many nats each claimed token loses to the one
that the verifier's own logits prefer. The statistic is log(mean margin + OFFSET): honest margins are mostly
0, and one lost token among a few dozen, at the step of bf16 logits (1/16 between 8 and 16), must not count as
far off. Each margin is capped, so that one token does not decide. (The paper's margins are in units of
logits; ours are taken after the division by the temperature.)

States can always be forged by one honest prefill over the tokens of a cheap model. Only this check sees it.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from bitassay.engines.sampling import Draw
from bitassay.verification.detectors.detector import Comparison, Detector, Series

OFFSET = 0.05  # nats a token


def token_margins(comparison: Comparison) -> tuple[float, ...]:
    """Return by how many nats each claimed token loses to the verifier's own choice."""
    header = comparison.header
    draws = [Draw(header.nonce, index) for index in range(len(header.output_ids))]
    claimed = torch.tensor(header.output_ids)
    return tuple(header.sampling.to_sampler().margins(comparison.verifier.logits, claimed, draws).tolist())


def token_statistic(margins: Sequence[float]) -> float:
    """Return log(mean margin + OFFSET)."""
    return math.log(fmean(margins) + OFFSET)


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the margins as one series by token."""
    return [Series(token_margins(comparison))]


TOKEN_DIFR = Detector(
    "token-difr",
    "the margins by which claimed tokens lose",
    check,
    smallest_sd=0.1,
    statistic=token_statistic,
    by_token=True,
)

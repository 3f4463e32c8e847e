"""Claimed tokens against the host's own last states.

The verifier applies the final norm and the output head to the host's states of the last layer, in its own
dtype, and draws from these logits. An honest host's tokens follow from its states: the two differ only where
the same product was summed in another order. So a token that another model chose, another temperature, a
watermark, a draft that was accepted though it loses a near tie: each shows by itself, at a margin that the
noise of a whole prefill hides. With the margin m of each token in nats and the noise sigma that the head's
rounding puts on the logits there (`token_noise.py`), the statistic is log(1 + the largest m / sigma).

A host that changes its last states to fit its tokens is for `segment_distance.py` and, where that is a
little in many places, for `token_noise.py`. Needs the states of all positions that choose tokens.
"""

from typing import Any

from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.detectors.token_noise import judged_by, largest_margin


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the margins in units of noise as one series by token."""
    own, precise, _ = comparison.replayed
    units, _, _ = judged_by(own.logits, comparison, own.logits, precise.logits)
    return [Series(tuple(units.tolist()))]


HEAD_MARGIN = Detector(
    "head-margin",
    "the claimed token that the host's own last states explain least",
    check,
    smallest_sd=0.1,
    statistic=largest_margin,
    by_token=True,
    whole=True,
)

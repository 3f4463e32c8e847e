"""A detector that looks at the length of the last state alone: |log(||x|| / ||y||)| at each position.

The host would send one number a token. It sees what scales the states, and nothing that only turns them.
"""

from typing import Any

from bitassay.verification.detectors.detector import Comparison, Detector, Series


def check(comparison: Comparison, proof: Any) -> list[Series]:
    """Return the absolute log ratios as one series."""
    x, y = (states.double().norm(dim=-1) for states in comparison.last())
    return [Series(tuple((x / y).log().abs().tolist()))]


NORM_RATIO = Detector(
    "norm-ratio",
    "the norm of the last state",
    check,
    smallest_sd=0.001,
    evidence_bytes=lambda layers, hidden: 2.0,
)

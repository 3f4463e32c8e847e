"""The host's rounding error compared with the verifier's own, at the same positions of the same request.

For each sampled layer the statistic of a run is

    mean over positions of  log(||x - r|| / ||r||) - log(||y - r|| / ||r||)

with the host's state x, the verifier's own y, and r, the verifier's in the next higher precision
(`engines/precise.py`). Both distances have the floor of `distance.py`.

How far rounding takes a run from r depends on the text: far in some languages, in code, in repetitions. It
takes x and y equally far where both computed the same model in the same dtype, so the text cancels: what
honest runs do to texts that calibration has never seen looks as it did to those that it has. The second gain
is power. x - r holds the noise of one run and x - y that of two, and what one request makes noisy no longer
hides a small change of the model in another.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.verification.detectors.detector import Comparison, Detector, Pair, Series
from bitassay.verification.detectors.distance import (
    by_layer,
    commit,
    distance_floor,
    full_states,
    relative_distances,
)


def rounding_distances(
    comparison: Comparison, pair: Pair
) -> tuple[Float[Tensor, "layers positions"], Float[Tensor, "layers positions"]]:
    """Return the relative distance from the precise states of `pair` of the host's states and of the
    verifier's own, in each cell, not below the floor."""
    host, own, shown = [], [], list(comparison.positions)
    for layer in comparison.header.layers:
        y, r = (prefill.states[layer][shown] for prefill in pair)
        host.append(relative_distances(comparison.claimed[layer], r))
        own.append(relative_distances(y, r))
    floor = distance_floor(comparison.dtype)
    return torch.stack(host).clamp(min=floor), torch.stack(own).clamp(min=floor)


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the log of the host's distance less that of the verifier's own, one series a layer."""
    host, own = rounding_distances(comparison, (comparison.verifier, comparison.reference))
    return by_layer(host.log() - own.log(), comparison.n_prompt)


def check_own(comparison: Comparison, _: Any) -> list[Series]:
    """Return the log distance of the verifier's own states, one series a layer."""
    _, own = rounding_distances(comparison, (comparison.verifier, comparison.reference))
    return by_layer(own.log(), comparison.n_prompt)


EXCESS_DISTANCE = Detector(
    "excess-distance",
    "the host's rounding error less the verifier's own, by layer",
    check,
    prove=commit,
    evidence_bytes=full_states,
)
ROUNDING = Detector(
    "rounding", "the verifier's own rounding error: how noisy the text is, whatever the host did", check_own
)

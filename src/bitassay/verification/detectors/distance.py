"""The relative distance of hidden states: the detector that decides verdicts, together with the tokens.

A cell (layer, position) with the host's state x and the verifier's y has the distance ||x - y|| / ||y||. The
statistic of a run is, for each sampled layer, the mean over positions of log distance: distances spread over
orders of magnitude, and their logs are near normal. Prompt and generated positions are kept apart, because
the host computed the ones in one forward, as the verifier does, and the others one at a time with a cache.

A distance is not taken below eps / 8 of the verifier's dtype, which is less than what rounding alone gives
(about eps / 4). Without that floor a few exactly copied positions, at log 0, would outweigh any number of
wrong ones.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.receipts.merkle import cell_leaves, merkle_root

CEILING = 1e6


def relative_distances(
    prover: Float[Tensor, "*cells hidden"], verifier: Float[Tensor, "*cells hidden"]
) -> Float[Tensor, "*cells"]:
    """Return ||x - y|| / ||y|| of each cell in float64, at most CEILING, which also stands for what cannot be
    computed."""
    x, y = prover.double(), verifier.double()
    return ratio((x - y).norm(dim=-1), y.norm(dim=-1))


def ratio(difference: Float[Tensor, "*cells"], norm: Float[Tensor, "*cells"]) -> Float[Tensor, "*cells"]:
    """Return difference / norm, 0 where there is no difference and at most CEILING."""
    return torch.where(difference == 0, 0.0, difference / norm).nan_to_num(nan=CEILING).clamp(max=CEILING)


def distance_floor(dtype: torch.dtype) -> float:
    """Return eps / 8 of `dtype`."""
    return torch.finfo(dtype).eps / 8


def cell_distances(comparison: Comparison) -> Float[Tensor, "layers positions"]:
    """Return the relative distance of each cell, not below the floor."""
    rows = [relative_distances(*comparison.pair(layer)) for layer in comparison.header.layers]
    return torch.stack(rows).clamp(min=distance_floor(comparison.dtype))


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the log distances, one series a layer."""
    return by_layer(cell_distances(comparison).log(), comparison.n_prompt)


def by_layer(cells: Float[Tensor, "layers positions"], n_prompt: int) -> list[Series]:
    """Return one series a layer."""
    return [Series(tuple(row[n_prompt:]), tuple(row[:n_prompt])) for row in cells.tolist()]


def commit(comparison: Comparison) -> bytes:
    """Return the Merkle root of the shown cells: the host's work where it commits to full states."""
    header = comparison.header
    return merkle_root(cell_leaves(comparison.claimed, comparison.positions, header.numerics.dtype))


def full_states(layers: int, hidden: int) -> float:
    """Return the bytes a token of full 16-bit states."""
    return 2.0 * layers * hidden


DISTANCE = Detector(
    "distance",
    "the relative distance of full states, by layer",
    check,
    prove=commit,
    evidence_bytes=full_states,
)

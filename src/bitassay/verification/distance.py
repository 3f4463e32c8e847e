"""The relative distance of hidden states, and what it says about a sequence.

A cell (layer, position) with the prover's state x and the verifier's y has the distance ||x - y|| / ||y||.
The statistic of a sequence is, for each layer, the mean over positions of log distance: distances spread over
orders of magnitude, and their logs are near normal. Prompt and generated positions are kept apart, because
the prover computed the ones in one forward, as the verifier does, and the others one at a time with a cache.

A distance is not taken below eps / 8 of the verifier's dtype, less than rounding alone gives (eps / 4,
about). Without that floor a few exactly copied positions, at log 0, would outweigh any number of wrong ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CEILING = 1e6


def relative_distances(
    prover: Float[Tensor, "*cells hidden"], verifier: Float[Tensor, "*cells hidden"]
) -> Float[Tensor, "*cells"]:
    """||x - y|| / ||y|| of each cell in float64, at most CEILING, which also stands for what cannot be
    computed."""
    x, y = prover.double(), verifier.double()
    difference, norm = (x - y).norm(dim=-1), y.norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / norm).nan_to_num(nan=CEILING).clamp(max=CEILING)


def mean_log_distance(distances: Float[Tensor, " cells"], floor: float) -> float:
    """Mean of log max(distance, floor); NaN for no cells."""
    return float(distances.clamp(min=floor).log().mean())


def distance_floor(dtype: torch.dtype) -> float:
    """eps / 8 of `dtype`."""
    return torch.finfo(dtype).eps / 8

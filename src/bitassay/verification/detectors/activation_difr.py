"""Activation-DiFR (arXiv 2511.20621): the host sends a random projection of each last hidden state.

A state x (hidden size h) becomes k numbers in fp16, 2 k bytes a token, and the verifier projects its own y in
the same way:

    P = S / sqrt(k),  S [k, h] of independent signs +1 and -1
    E ||P (x - y)||^2 = ||x - y||^2    for whatever x - y does not depend on S; standard deviation
                                       at most sqrt(2 / k) ||x - y||^2
    distance = ||P x - P y|| / ||y||

so the square of a token's distance is an unbiased estimate of the squared relative distance of the full
states (`distance.py`). It is divided by ||y||, which the verifier knows, and not by ||P y||, which would
add noise. The statistic is the mean over tokens of log distance, with the same floor as there.

The signs are the bits of NumPy's Philox stream, keyed by SHA-256 of the seed, so that every machine has the
same ones without a matrix being sent. Signs are exact everywhere, unlike orthogonal matrices from a QR
factorization or Gaussians from a logarithm, and their variance is below that of Gaussians (Achlioptas 2003).
Sums are taken in float64; another order of summation moves an fp16 number by at most its last bit.

Left out: the seed should not be known before the host has decided how to compute, or a host could fit what
it computes to the k projections. Here it is fixed, and projections are made from the full states; a host
would send them alone, by a seed from the request's nonce.
"""

import hashlib

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.detectors.distance import distance_floor, ratio
from bitassay.verification.receipts.proof import philox_signs

DIMENSIONS = 8
SEED = 0


def signs(hidden: int, seed: int, k: int = DIMENSIONS) -> Float64[Tensor, "hidden k"]:
    """Return independent signs +1 and -1, a function of the three arguments alone."""
    key = hashlib.sha256(f"bitassay signs 1\0{seed}\0{hidden}\0{k}".encode()).digest()[:16]
    return torch.from_numpy(philox_signs(key, hidden * k)).reshape(hidden, k)


def project(
    states: Float[Tensor, "positions hidden"],
    seed: int,
    k: int = DIMENSIONS,
    dtype: torch.dtype = torch.float16,
) -> Float[Tensor, "positions k"]:
    """Return P x of each state, rounded to `dtype`: what the host sends.

    Raises BitassayError where a finite state has a projection that `dtype` cannot hold.
    """
    exact = states.detach().cpu().double() @ signs(states.shape[-1], seed, k) / k**0.5
    rounded = exact.to(dtype)
    if (rounded.isinf() & exact.isfinite()).any():
        raise BitassayError(f"a projection of {exact.abs().max():.3g} is too large for {dtype}", "bfloat16")
    return rounded


def projection_distances(
    claimed: Float[Tensor, "positions k"], states: Float[Tensor, "positions_ hidden"], seed: int
) -> Float64[Tensor, " positions"]:
    """Return ||P x - P y|| / ||y|| of each position, from the claimed projections of x and the verifier's own
    states y, at most CEILING.

    Raises BitassayError where the numbers of positions differ.
    """
    if len(claimed) != len(states):
        raise BitassayError(f"{len(claimed)} projections cannot be compared with {len(states)} states")
    projected = project(states, seed, claimed.shape[-1], claimed.dtype)
    difference = (claimed.cpu().double() - projected.double()).norm(dim=-1)
    return ratio(difference, states.detach().cpu().double().norm(dim=-1))


def check(comparison: Comparison, claimed: Float[Tensor, "generated k"]) -> list[Series]:
    """Return the log distances of the projections as one series."""
    distances = projection_distances(claimed, comparison.last()[1], SEED)
    return [Series(tuple(distances.clamp(min=distance_floor(comparison.dtype)).log().tolist()))]


ACTIVATION_DIFR = Detector(
    "activation-difr",
    "random projections of the last state",
    check,
    prove=lambda comparison: project(comparison.last()[0], SEED),
    evidence_bytes=lambda layers, hidden: 2.0 * DIMENSIONS,
)

"""DiFR, "divergence from reference" (arXiv 2511.20621): two checks that need little or no evidence.

**Activation-DiFR.** The prover sends a random projection of each last hidden state x (hidden size h) to k
numbers in fp16, 2 k bytes a token, and the verifier projects its own y in the same way:

    P = S / sqrt(k),  S [k, h] of independent signs +1 and -1
    E ||P (x - y)||^2 = ||x - y||^2    for whatever x - y does not depend on S; standard deviation
                                       at most sqrt(2 / k) ||x - y||^2
    distance = ||P x - P y|| / ||y||

so the square of a token's distance is an unbiased estimate of the squared relative distance of the full
states (`distance.py`). It is divided by ||y||, which the verifier knows, and not by ||P y||, which would
add noise. A sequence's score is the mean over tokens of log distance, with the same floor as there.

The signs are the bits of NumPy's Philox stream, keyed by SHA-256 of the seed, so that every machine has the
same ones without a matrix being sent. Signs, because they are exact everywhere, which orthogonal matrices
from a QR factorization or Gaussians from a logarithm are not; their variance is below that of Gaussians
(Achlioptas 2003). The sums are taken in float64; another order of summation can move an fp16 number by one
last bit, 1/2048 of it, far below honest distances.

**Token-DiFR.** Nothing is sent. With the sampling noise rebuilt, `generate.sampling.Sampler.margins` says
by how many nats each claimed token loses to the verifier's own; the score of a sequence is the mean margin,
each margin capped so that one token does not decide. (The paper's margins are in units of logits, ours
after the division by the temperature.)

Left out: the seed should not be known before the host has decided how to compute, or a host could fit what
it computes to the k projections; take it from the request's nonce. And states can always be forged by one
honest prefill over the tokens of a cheap model, to which only the token score is not blind.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bitassay.engines.sampling import MARGIN_CAP
from bitassay.errors import BitassayError
from bitassay.verification.distance import CEILING, distance_floor, mean_log_distance

DIMENSIONS = 8


def signs(hidden: int, seed: int, k: int = DIMENSIONS) -> Float64[Tensor, "hidden k"]:
    """Independent signs +1 and -1, a function of the three arguments alone."""
    key = hashlib.sha256(f"bitassay signs 1\0{seed}\0{hidden}\0{k}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-hidden * k // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: hidden * k]
    return torch.from_numpy(1.0 - 2.0 * bits).reshape(hidden, k)


def project(
    states: Float[Tensor, "positions hidden"],
    seed: int,
    k: int = DIMENSIONS,
    dtype: torch.dtype = torch.float16,
) -> Float[Tensor, "positions k"]:
    """P x of each state, rounded to `dtype`: what the prover sends.

    Raises BitassayError where a finite state has a projection that `dtype` cannot hold.
    """
    exact = states.detach().cpu().double() @ signs(states.shape[-1], seed, k) / k**0.5
    rounded = exact.to(dtype)
    if (rounded.isinf() & exact.isfinite()).any():
        raise BitassayError(f"a projection of {exact.abs().max():.3g} is too large for {dtype}", "bfloat16")
    return rounded


def projection_distances(
    claimed: Float[Tensor, "positions k"],
    states: Float[Tensor, "positions_ hidden"],
    seed: int,
) -> Float64[Tensor, " positions"]:
    """||P x - P y|| / ||y|| of each position, from the claimed projections of x and the verifier's own states
    y; at most CEILING, which also stands for what cannot be computed.

    Raises BitassayError where the numbers of positions differ.
    """
    if len(claimed) != len(states):
        raise BitassayError(f"{len(claimed)} projections cannot be compared with {len(states)} states")
    own = project(states, seed, claimed.shape[-1], claimed.dtype)
    difference = (claimed.cpu().double() - own.double()).norm(dim=-1)
    norm = states.detach().cpu().double().norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / norm).nan_to_num(nan=CEILING).clamp(max=CEILING)


def activation_score(
    claimed: Float[Tensor, "positions k"], states: Float[Tensor, "positions_ hidden"], seed: int
) -> float:
    """Mean log distance of a sequence; larger is less honest. NaN for no positions."""
    return mean_log_distance(projection_distances(claimed, states, seed), distance_floor(states.dtype))


def token_score(margins: Float[Tensor, " tokens"], cap: float = MARGIN_CAP) -> float:
    """Mean margin of a sequence in nats, each at most `cap`; larger is less honest. NaN for no tokens."""
    return float(margins.double().clamp(max=cap).mean())

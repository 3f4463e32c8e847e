"""TOPLOC (arXiv 2501.16007): 32 tokens of last hidden states as one polynomial of 258 bytes.

The largest numbers of a hidden state survive a change of kernel or device; another model, prompt or
precision changes them. So a prover sends the top 128 of each chunk of 32 tokens, by absolute value in bf16,
without saying which they are. With i_1 .. i_k the flat indices of the top k numbers (position in the chunk
x hidden size + column), b_1 .. b_k their 16-bit patterns, and p = 65497, the largest m <= p for which the
i_j mod m are distinct, and the one polynomial f of degree below k over GF(p) with

    f(i_j mod m) = b_j mod p

make the proof: m, then the k coefficients from the constant on, each a 16-bit integer with the high byte
first. p is a prime below 2^16; every pattern from p on is a NaN, so of a finite state nothing is lost.

The verifier takes the top k indices of its own states, evaluates f there, and compares what comes out with
its own numbers by bit fields (signs do not count):

    exponent_mismatches   of the k numbers, those whose exponents differ. An index that the prover did not
                          interpolate decodes to a random pattern and is nearly always among them.
    mantissa_mean,        of |difference of the 7-bit mantissas| where the exponents agree, in units of the
    mantissa_median       last bit; 2^64 where none agrees

Published limits for bf16: a chunk is accepted with at most 38 mismatches, a mean of at most 10 and a median
of at most 8. They let INT8 weights pass, so there is a score too, whose limit is calibrated like any other:

    score = mean over chunks of log(mantissa_mean + 1/2) + log(1 + exponent_mismatches / 38)

The mean mantissa error is an average over a hundred numbers and carries nearly all the power; mismatches are
mostly chance at the edge of the top k, so their plain sum would drown it. The mean alone could be gamed, by
leaving all indices unreadable but the few that hardly ever change; that costs log 4 here. Half a bit keeps
the log of a perfect chunk finite. A proof of 32 tokens cannot be cut, so the score after n tokens is that of
proofs made at the largest of GRID up to n.

Differences from the published code (PrimeIntellect-ai/toploc 0.1.6), which reads our proofs as we read its:
ties at the edge of the top k go to the lowest indices (there: to the sort of the device); the median is the
usual one, as in its Python path; and a proof that cannot be made or read is an error, never zeros.

Left out: a proof says nothing of values outside the top k nor of signs, and one honest prefill over the
tokens of a cheap model forges it. It must come with a check of the tokens.
"""

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt16
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.verification.detectors.detector import Comparison, Detector, Series, last

PRIME = 65497
SMALLEST_MODULUS = 2**15 + 1
CHUNK, TOP = 32, 128
MANTISSA_BITS = 7
NONE_AGREES = 2.0**64


@dataclass(frozen=True)
class ChunkStatistics:
    """exponent_mismatches: a count among the top numbers of the chunk. mantissa errors in units of the last
    bit."""

    exponent_mismatches: int
    mantissa_mean: float
    mantissa_median: float


BF16_LIMITS = ChunkStatistics(exponent_mismatches=38, mantissa_mean=10, mantissa_median=8)


def prove_chunks(
    states: Float[Tensor, "positions hidden"], chunk: int = CHUNK, top: int = TOP
) -> list[bytes]:
    """Return one proof for each `chunk` positions, the last for what is left: 2 + 2 k bytes, where k is `top`
    or, if less, the chunk's size. States of another dtype are rounded to bf16.

    Raises BitassayError for states that are not finite.
    """
    proofs = []
    for bits in _chunks(states, chunk):
        indices = largest(bits, top)
        modulus = injective_modulus(indices)
        coefficients = interpolate(indices % modulus, bits[indices].astype(np.int64) % PRIME)
        proofs.append(np.array([modulus, *coefficients], dtype=">u2").tobytes())
    return proofs


def check_chunks(
    proofs: Sequence[bytes], states: Float[Tensor, "positions hidden"], chunk: int = CHUNK, top: int = TOP
) -> list[ChunkStatistics]:
    """Return the statistics of each chunk of the verifier's own `states`. The proofs may come from anyone.

    Raises BitassayError for a number of proofs, a size, a modulus or a coefficient that cannot be.
    """
    chunks = _chunks(states, chunk)
    if len(proofs) != len(chunks):
        raise BitassayError(
            f"{len(proofs)} TOPLOC proofs for {len(states)} positions, which make {len(chunks)} chunks"
        )
    statistics = []
    for number, (proof, bits) in enumerate(zip(proofs, chunks, strict=True)):
        modulus, coefficients = parse_proof(proof, min(top, len(bits)), f"TOPLOC proof {number}")
        indices = largest(bits, top)
        statistics.append(compare(evaluate(coefficients, indices % modulus), bits[indices].astype(np.int64)))
    return statistics


def accepted(statistics: ChunkStatistics, limits: ChunkStatistics = BF16_LIMITS) -> bool:
    """Return whether none of the statistics of a chunk is above its limit."""
    return all(value <= limit for value, limit in zip(astuple(statistics), astuple(limits), strict=True))


def score(chunks: Sequence[ChunkStatistics]) -> float:
    """Return how unlike an honest run one or more chunks are, on a log scale; larger is worse."""
    mismatches = np.array([chunk.exponent_mismatches for chunk in chunks]) / BF16_LIMITS.exponent_mismatches
    means = np.array([chunk.mantissa_mean for chunk in chunks])
    return float(np.mean(np.log(means + 0.5) + np.log1p(mismatches)))


def parse_proof(proof: bytes, top: int, name: str = "TOPLOC proof") -> tuple[int, Int64[np.ndarray, " k"]]:
    """Return modulus and coefficients [top] of a proof that may come from anyone. Raises BitassayError."""
    if len(proof) != 2 + 2 * top:
        raise BitassayError(f"{name} has {len(proof)} bytes instead of {2 + 2 * top}")
    modulus, *coefficients = np.frombuffer(proof, dtype=">u2").tolist()
    if not SMALLEST_MODULUS <= modulus <= PRIME:
        raise BitassayError(f"{name} has the modulus {modulus}, not one of {SMALLEST_MODULUS} to {PRIME}")
    if coefficients and max(coefficients) >= PRIME:
        raise BitassayError(f"{name} has the coefficient {max(coefficients)}, not below {PRIME}")
    return modulus, np.array(coefficients, dtype=np.int64)


def compare(claimed: Int64[np.ndarray, " k"], expected: Int64[np.ndarray, " k"]) -> ChunkStatistics:
    """Return the statistics of the 16-bit patterns `claimed` against the verifier's `expected`."""
    agree = (claimed >> MANTISSA_BITS) & 0xFF == (expected >> MANTISSA_BITS) & 0xFF
    mantissa = 2**MANTISSA_BITS - 1
    errors = np.abs((claimed & mantissa) - (expected & mantissa))[agree]
    mean, median = (errors.mean(), np.median(errors)) if len(errors) else (NONE_AGREES, NONE_AGREES)
    return ChunkStatistics(int((~agree).sum()), float(mean), float(median))


def largest(bits: UInt16[np.ndarray, " size"], top: int) -> Int64[np.ndarray, " k"]:
    """Return the flat indices of the `top` largest magnitudes among bf16 patterns, at the edge the lowest of
    equal ones.

    Without their signs the patterns of finite numbers are in the order of their magnitudes.
    """
    magnitudes, top = bits & 0x7FFF, min(top, len(bits))
    edge = np.partition(magnitudes, len(bits) - top)[len(bits) - top]
    above = np.flatnonzero(magnitudes > edge)
    return np.concatenate([above, np.flatnonzero(magnitudes == edge)[: top - len(above)]])


def injective_modulus(indices: Int64[np.ndarray, " k"]) -> int:
    """Return the largest m <= PRIME for which `indices` mod m are distinct."""
    for modulus in range(PRIME, SMALLEST_MODULUS - 1, -1):
        if len(np.unique(indices % modulus)) == len(indices):
            return modulus
    raise BitassayError(f"no modulus keeps these {len(indices)} indices apart", "a smaller chunk or top")


def interpolate(x: Int64[np.ndarray, " k"], y: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    """Return the coefficients, constant first, of the polynomial of degree below k through all (x, y) over
    GF(PRIME); the x are distinct modulo PRIME.

    Newton's divided differences, then Horner's rule on polynomials: f = c_0 + (X - x_0) (c_1 + (X - x_1)
    (...)).
    """
    differences, inverse = y % PRIME, _inverses()
    for step in range(1, len(x)):
        rise = (differences[step:] - differences[step - 1 : -1]) % PRIME
        differences[step:] = rise * inverse[(x[step:] - x[:-step]) % PRIME] % PRIME
    coefficients = np.zeros(len(x) + 1, dtype=np.int64)
    for node, difference in zip(x[::-1], differences[::-1], strict=True):
        shifted = np.roll(coefficients, 1)  # the last one is still 0: the degree stays below k
        coefficients = (shifted - node * coefficients) % PRIME
        coefficients[0] += difference
    return coefficients[:-1] % PRIME


def evaluate(
    coefficients: Int64[np.ndarray, " k"], x: Int64[np.ndarray, " points"]
) -> Int64[np.ndarray, " points"]:
    """Return f(x) over GF(PRIME) for each x, by Horner's rule."""
    values = np.zeros(len(x), dtype=np.int64)
    for coefficient in coefficients[::-1]:
        values = (values * x + coefficient) % PRIME
    return values


@functools.cache
def _inverses() -> Int64[np.ndarray, " prime"]:
    """Return 1 / a for each a of GF(PRIME), and 0 for 0: a^(PRIME - 2)."""
    power, inverse, exponent = np.arange(PRIME, dtype=np.int64), np.ones(PRIME, dtype=np.int64), PRIME - 2
    while exponent:
        if exponent & 1:
            inverse = inverse * power % PRIME
        power, exponent = power * power % PRIME, exponent >> 1
    return inverse


def _chunks(states: Float[Tensor, "positions hidden"], chunk: int) -> list[np.ndarray]:
    """Return the bf16 patterns of each `chunk` positions, flat."""
    rounded = states.detach().cpu().to(torch.bfloat16).contiguous()
    if not rounded.isfinite().all():
        raise BitassayError("hidden states hold NaN or infinity in bf16, of which TOPLOC has no proof")
    patterns = rounded.view(torch.int16).numpy().view(np.uint16)
    return [patterns[start : start + chunk].reshape(-1) for start in range(0, len(patterns), chunk)]


def check(comparison: Comparison, proofs: Sequence[bytes]) -> list[Series]:
    """Return the score of all chunks as one number, and whether all are within the published limits."""
    chunks = check_chunks(proofs, comparison.last()[1])
    values = (score(chunks),) if chunks else ()
    return [Series(values, accepted=all(map(accepted, chunks)) if chunks else None)]


TOPLOC = Detector(
    "toploc",
    "the largest numbers of the last state, as polynomials",
    check,
    smallest_sd=0.1,
    statistic=last,
    prove=lambda comparison: prove_chunks(comparison.last()[0]),
    by_token=True,
    divisible=False,
    evidence_bytes=lambda layers, hidden: (2 + 2 * TOP) / CHUNK,
)

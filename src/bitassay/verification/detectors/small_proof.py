"""Small proofs: a few projections of the last state, 2 or 8 bytes a token (`receipts/proof.py`).

With d the errors of the host's projections against the reference r, the verifier's own state y, and the step
2^e of the proof, each generated position has

    v = log sqrt(mean_j d_j^2 / (||y - r||^2 + 4^e / 12))        statistic = log(mean exp v)

The denominator is what the numerator is on average where the host rounds as the verifier does. Like that of
`excess_distance.py` it takes out the text; it is made of full states, which the verifier has, so it adds no
noise of projections. The statistic is a mean of errors and not of logs, since one projection is near 0 now
and then and its log far below all others. Nor is it a mean of squares: a few positions of honest runs are far
off, whose squares would be most of it.

A proof whose step is not that of states like r says nothing, and has the largest v at every position.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.detectors.distance import CEILING, commit
from bitassay.verification.receipts.proof import SIZES, SmallProof, proof_errors, small_proof, step_exponents
from bitassay.verification.receipts.receipt import commitment_of

SMALLEST = 1e-6  # of an error's share in what is expected


def log_mean(values: Sequence[float]) -> float:
    """Return log(mean exp v)."""
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values) / len(values))


def prove(comparison: Comparison, size: int) -> SmallProof:
    """Return the proof that the host of these states would have sent with its receipt."""
    header = comparison.header
    return small_proof(
        comparison.last()[0],
        comparison.positions[comparison.n_prompt :],
        dtype=header.numerics.dtype,
        nonce=header.nonce,
        commitment=commitment_of(commit(comparison), header),
        size=size,
    )


def check(comparison: Comparison, proof: SmallProof) -> list[Series]:
    """Return v of each generated position, for a proof that was made of what the comparison shows."""
    return [check_claimed(comparison, proof, commitment_of(commit(comparison), comparison.header))]


def check_claimed(comparison: Comparison, proof: SmallProof, commitment: bytes) -> Series:
    """Return v of each generated position, for a proof that belongs to `commitment`."""
    header, positions = comparison.header, comparison.positions[comparison.n_prompt :]
    reference = comparison.reference.states[header.layers[-1]][list(positions)].cpu().double()
    if not positions:
        return Series(())
    if proof.exponent not in step_exponents(reference, header.numerics.dtype):
        return Series((math.log(CEILING),) * len(positions))
    errors = proof_errors(proof, reference, positions, nonce=header.nonce, commitment=commitment)
    own = (comparison.last()[1].cpu().double() - reference).square().sum(dim=1).numpy()
    ratio = np.sqrt(errors / (own + np.ldexp(1.0, 2 * proof.exponent) / 12))
    return Series(tuple(np.log(np.clip(np.nan_to_num(ratio, nan=CEILING), SMALLEST, CEILING)).tolist()))


SMALL_PROOFS = tuple(
    Detector(
        f"proof-{size}",
        f"projections of the last state, {size} bytes a token",
        check,
        statistic=log_mean,
        prove=partial(prove, size=size),
        evidence_bytes=partial(lambda size, layers, hidden: float(size), size),
    )
    for size in SIZES
)

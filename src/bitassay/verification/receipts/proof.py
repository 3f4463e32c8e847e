"""The small proof: 2 or 8 bytes a token of what a host computed, for a verdict without an opening.

For each generated position p the host projects its state x of the last sampled layer, of h numbers, on k
vectors of random signs and sends the lowest four bits of each projection, in steps of 2^e:

    key    = the first 16 bytes of H("bitassay proof signs 1" | commitment | p | nonce), little-endian
    s_j    = signs [h], from the bits of the Philox stream of that key        j = 1 .. k
    q_j    = round(s_j . x / 2^e) mod 16                                      k = 4: 2 bytes; k = 16: 8 bytes
    e      = floor(log2 N) + STEP of the dtype,   N^2 = mean over positions of ||x||^2

The verifier, who has the state r of the same position in the next higher precision (`engines/precise.py`),
knows s_j . r and so takes the multiple of 16 steps that is nearest:

    d_j    = ((q_j - s_j . r / 2^e + 8) mod 16 - 8) 2^e,     E d_j^2 = ||x - r||^2 + 4^e / 12

as long as |s_j . (x - r)| stays below 8 steps. High bits would tell it nothing that it does not know; without
them four projections take the room of one number in fp16, so that a proof of the same size is an average over
four times as many. A step is 4 units in the last place of the dtype, about what honest runs differ by. What
is farther off wraps around, to an error of 4.6 steps on average: that is less than it was, and still far.

**Commitment first.** The signs depend on the Merkle root of all states, so a host fixes these before it knows
what it will be asked about. It may commit to nothing in particular (nobody opens anything), but then it has
to guess: four bits of s . r are uniform to anybody who does not know r to within a few steps, whatever else
he knows. Signs that suit a wrong state x' can be searched for, by changing the root, only where x' - r is
known, that is by those who have run the model. Even then n positions lower the mean by g nats only after

    2^(n k (2 g - 1 + exp(-2 g)) / (2 ln 2))        tries on average

by the large deviations of a chi-square of n k degrees of freedom: for 0.35 nats 2^36 where 64 tokens have 2
bytes each, 2^143 where they have 8. The file of a proof is one line of JSON, a list; `docs/proof-format.md`
is its specification.

Left out: prompt positions, and all layers but the last. One honest prefill over the tokens of a cheap model
makes a perfect proof, as it makes perfect states: it must come with a check of the tokens.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from jaxtyping import Float, Float64
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.record.files import write_bytes
from bitassay.record.hashing import canonical_json
from bitassay.verification.container import TraceError, read_regular, strict_json
from bitassay.verification.receipts.receipt import Receipt, base64_bytes, base64_text
from bitassay.verification.trace import Trace

SIZES = (2, 8)  # bytes a token
STEP = {"bfloat16": -5, "float16": -8, "float32": -21}  # log2 of the step, of states of norm 1
SIGNS, SIGNED = b"bitassay proof signs 1\0", b"bitassay proof 1\0"
BITS, MODULUS = 4, 16
EXPONENTS = range(-128, 128)
NORM_TOLERANCE = 0.05  # of N, between an honest host and the verifier
PROOF_BYTES = 2**22
_VERSION = "bitassay proof 1"


@dataclass(frozen=True)
class SmallProof:
    """exponent: e, of the step 2^e. residues: q of each position, ascending, two to a byte, the lower half of
    a byte first."""

    exponent: int
    residues: bytes

    def size(self, positions: int) -> int:
        """Return the bytes a token. Raises the TraceError "wrong-shape" for none of SIZES."""
        for size in SIZES:
            if positions and len(self.residues) == size * positions:
                return size
        problem = f"{len(self.residues)} bytes for {positions} generated positions"
        raise TraceError("wrong-shape", f"proof: {problem}")

    def numbers(self, positions: int) -> Float64[np.ndarray, "positions k"]:
        """Return q of each position and projection."""
        packed = np.frombuffer(self.residues, np.uint8).reshape(positions, self.size(positions))
        halves = np.stack([packed & (MODULUS - 1), packed >> BITS], axis=-1)
        return halves.reshape(positions, -1).astype(np.float64)


@dataclass(frozen=True)
class SignedProof:
    """A proof and the signature under it, by the key of the receipt whose commitment it names."""

    commitment: bytes
    proof: SmallProof
    signature: bytes

    @property
    def message(self) -> bytes:
        """Return what is signed."""
        exponent = self.proof.exponent.to_bytes(1, "little", signed=True)
        return SIGNED + self.commitment + exponent + self.proof.residues


def small_proof(
    states: Float[Tensor, "positions hidden"],
    positions: Sequence[int],
    *,
    dtype: str,
    nonce: str,
    commitment: bytes,
    size: int,
) -> SmallProof:
    """Return the proof of `size` bytes a token that a host sends. states: of the last sampled layer, at
    `positions`, ascending. dtype: the declared one.

    Raises BitassayError for states that are not finite and for a size that is none of SIZES.
    """
    if size not in SIZES:
        raise BitassayError(f"a proof of {size} bytes a token", f"one of {SIZES}")
    if not states.isfinite().all():
        raise BitassayError("a state has NaN or infinity, of which there is no proof")
    exponent = step_exponents(states, dtype, tolerance=0)[0]
    projected = projections(states, positions, nonce, commitment, 2 * size)
    q = (np.rint(np.ldexp(projected, -exponent)) % MODULUS).astype(np.uint8)
    return SmallProof(exponent, (q[:, 0::2] | q[:, 1::2] << BITS).tobytes())


def proof_errors(
    proof: SmallProof,
    reference: Float[Tensor, "positions hidden"],
    positions: Sequence[int],
    *,
    nonce: str,
    commitment: bytes,
) -> Float64[np.ndarray, " positions"]:
    """Return the mean square of d at each position. reference: r of the same positions."""
    q = proof.numbers(len(positions))
    projected = projections(reference, positions, nonce, commitment, q.shape[1])
    half = MODULUS / 2
    d = np.ldexp((q - np.ldexp(projected, -proof.exponent) + half) % MODULUS - half, proof.exponent)
    return np.square(d).mean(axis=1)


def step_exponents(
    states: Float[Tensor, "positions hidden"], dtype: str, tolerance: float = NORM_TOLERANCE
) -> list[int]:
    """Return the exponents e that a host with states like these may have: one, or two where N is within
    `tolerance` of a power of two."""
    norm = states.double().square().sum(dim=1).mean().sqrt().item()
    if not 0 < norm < math.inf:
        return [EXPONENTS[0]]
    found = {math.frexp(norm * factor)[1] - 1 for factor in (1 - tolerance, 1 + tolerance)}
    return sorted(min(max(each + STEP[dtype], EXPONENTS[0]), EXPONENTS[-1]) for each in found)


def signs(
    commitment: bytes, position: int, nonce: str, hidden: int, k: int
) -> Float64[np.ndarray, "k hidden"]:
    """Return the signs +1 and -1 of one position; those of fewer projections are the first of more."""
    seed = hashlib.sha256(SIGNS + commitment + position.to_bytes(4, "little") + nonce.encode()).digest()
    return philox_signs(seed[:16], hidden * k).reshape(k, hidden)


def philox_signs(key: bytes, count: int) -> Float64[np.ndarray, " count"]:
    """Return signs +1 and -1 from the bits of the Philox stream of a key of 16 bytes."""
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-count // 64))
    return 1.0 - 2.0 * np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:count]


def projections(
    states: Float[Tensor, "positions hidden"], positions: Sequence[int], nonce: str, commitment: bytes, k: int
) -> Float64[np.ndarray, "positions k"]:
    """Return s_j . x of each position, summed in float64."""
    rows = states.detach().cpu().double().numpy()
    found = [
        signs(commitment, position, nonce, row.shape[0], k) @ row
        for position, row in zip(positions, rows, strict=True)
    ]
    return np.array(found).reshape(-1, k)


def sign_proof(trace: Trace, receipt: Receipt, key: Ed25519PrivateKey, size: int = SIZES[-1]) -> SignedProof:
    """Return the signed proof of `trace` that belongs to its `receipt`. Raises TraceError where there is no
    generated position."""
    header, n_prompt = trace.header, trace.n_prompt
    proof = small_proof(
        trace.states[header.layers[-1]][n_prompt:],
        header.positions[n_prompt:],
        dtype=header.numerics.dtype,
        nonce=header.nonce,
        commitment=receipt.commitment,
        size=size,
    )
    proof.size(len(header.positions) - n_prompt)
    signed = SignedProof(receipt.commitment, proof, b"")
    return SignedProof(receipt.commitment, proof, key.sign(signed.message))


def check_proof(signed: SignedProof, receipt: Receipt, where: str = "proof") -> None:
    """Raise the TraceError for the first way in which a proof does not belong to `receipt`."""
    if signed.commitment != receipt.commitment:
        raise TraceError("other-receipt", f"{where}: a proof of another receipt")
    try:
        Ed25519PublicKey.from_public_bytes(receipt.key).verify(signed.signature, signed.message)
    except (InvalidSignature, ValueError) as error:
        raise TraceError("bad-signature", f"{where}: the receipt's key has not signed it") from error
    signed.proof.size(len(receipt.header.positions) - len(receipt.header.prompt_ids))


def write_proof(path: str | Path, signed: SignedProof) -> None:
    """Write a proof, whole or not at all."""
    write_bytes(path, encode_proof(signed))


def read_proof(path: str | Path, receipt: Receipt) -> SignedProof:
    """Read a proof that may come from anyone, and check that it belongs to `receipt`. Raises TraceError
    for each defect, "withheld-proof" where there is no file."""
    path = Path(path)
    if not path.exists():
        raise TraceError("withheld-proof", f"{path}: the host has sent no proof")
    signed = decode_proof(read_regular(path, PROOF_BYTES), path)
    check_proof(signed, receipt, str(path))
    return signed


def encode_proof(signed: SignedProof) -> bytes:
    """Return one line of JSON: version, commitment, exponent, residues, signature."""
    binary = (base64_text(each) for each in (signed.proof.residues, signed.signature))
    content = [_VERSION, base64_text(signed.commitment), signed.proof.exponent, *binary]
    return (canonical_json(content) + "\n").encode()


def decode_proof(data: bytes, where: Path) -> SignedProof:
    """Return the proof in `data`; what it belongs to is not checked here. Raises TraceError."""
    values = strict_json(data, where)
    if not isinstance(values, list) or len(values) != 5 or values[0] != _VERSION:
        raise TraceError("not-a-proof", f"{where}: not a {_VERSION!r}")
    _, commitment, exponent, residues, signature = values
    if type(exponent) is not int or exponent not in EXPONENTS:
        raise TraceError("header-field", f"{where}: the exponent is not a whole number from -128 to 127")
    signed = SignedProof(
        base64_bytes(commitment, "commitment", 32, where),
        SmallProof(exponent, base64_bytes(residues, "residues", None, where)),
        base64_bytes(signature, "signature", 64, where),
    )
    if encode_proof(signed) != data:
        raise TraceError("not-canonical", f"{where}: spelled in another way than proofs are")
    return signed

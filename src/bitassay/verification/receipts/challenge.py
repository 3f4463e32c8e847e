"""The challenge: which positions a host must open, chosen by nobody.

    seed = H("bitassay challenge 1" | commitment | beacon)

and of the generated positions, and likewise of the prompt's, those are opened whose H(seed | position) is
smallest. An opened position shows all sampled layers, so both halves of the evidence have the same layers.
The commitment (root and header, see `receipt.py`) is part of the seed, but the signature is not: a host could
sign the same claims in many ways and keep the one that it likes.

**The beacon must come after the commitment.** It is 32 random bytes of the verifier, made when it has the
receipt; or a public one (a drand round) whose round began after the receipt was handed over. A host that can
foresee or choose the beacon grinds: it alters an unimportant bit of a bad cell, commits again, and looks
where the challenge falls. Of n positions of which b are bad, k opened ones miss all bad ones with probability
C(n - b, k) / C(n, k), and each try costs one hash of the tree: seconds, not security. With a beacon that it
cannot foresee, a host has one try. The challenge names the commitment, so a second receipt does not answer
it.

Left out: the statistic is a mean, so a few bad cells in a long text that are opened do not make a verdict by
themselves; the challenge makes the opened mean an honest sample of the mean over all.
"""

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from bitassay.errors import BitassayError
from bitassay.record.files import read_json, write_json
from bitassay.record.schema import StrictFields
from bitassay.verification.container import first_defect
from bitassay.verification.receipts.receipt import Receipt
from bitassay.verification.trace import TOKENS, Digest, Header, Version

GENERATED, PROMPT = 32, 8
SEED = b"bitassay challenge 1\0"
CHALLENGE_BYTES = 2**12


class Challenge(StrictFields):
    """commitment: of the receipt that is challenged. generated, prompt: how many positions of each to open;
    all where there are fewer."""

    challenge: Version = 1
    commitment: Digest
    beacon: Digest
    generated: int = Field(ge=1, le=TOKENS)
    prompt: int = Field(ge=1, le=TOKENS)


def challenge(
    receipt: Receipt, *, beacon: bytes | None = None, generated: int = GENERATED, prompt: int = PROMPT
) -> Challenge:
    """Return a challenge of `receipt`. beacon: 32 bytes that nobody could know before the receipt was handed
    over (default: fresh random ones)."""
    beacon = secrets.token_bytes(32) if beacon is None else beacon
    try:
        return Challenge(
            commitment=receipt.commitment.hex(), beacon=beacon.hex(), generated=generated, prompt=prompt
        )
    except ValidationError as error:
        raise _not_a_challenge("challenge", error) from error


def opened_positions(challenge: Challenge, header: Header) -> tuple[int, ...]:
    """Return the positions to open, ascending: of the prompt first, then generated ones."""
    seed = hashlib.sha256(
        SEED + bytes.fromhex(challenge.commitment) + bytes.fromhex(challenge.beacon)
    ).digest()
    n_prompt = len(header.prompt_ids)
    prompt = _smallest(seed, header.positions[:n_prompt], challenge.prompt)
    return (*prompt, *_smallest(seed, header.positions[n_prompt:], challenge.generated))


def write_challenge(path: str | Path, challenge: Challenge) -> None:
    """Write a challenge, whole or not at all."""
    write_json(Path(path), challenge.model_dump())


def read_challenge(path: str | Path) -> Challenge:
    """Read a challenge that may come from anyone; a defect is a BitassayError that names the file."""
    try:
        return Challenge.model_validate(read_json(Path(path), limit_bytes=CHALLENGE_BYTES))
    except ValidationError as error:
        raise _not_a_challenge(str(path), error) from error


def _smallest(seed: bytes, positions: Sequence[int], count: int) -> list[int]:
    def draw(position: int) -> bytes:
        return hashlib.sha256(seed + position.to_bytes(4, "little")).digest()

    return sorted(sorted(positions, key=draw)[:count])


def _not_a_challenge(where: str, error: ValidationError) -> BitassayError:
    return BitassayError(
        f"{where}: not a challenge: {first_defect(error)}", "bitassay challenge RECEIPT --out FILE"
    )

"""The opening: the challenged cells of a committed trace, with the proof that they were committed to.

It is a safetensors file, as a trace is. Its metadata names the commitment and the beacon that it answers; a
tensor `layer.<l>` has the opened positions' states, ascending, in the declared dtype, and `proof` has the
hashes of `merkle_proof`, 32 bytes a row. What must be in it follows from receipt and challenge alone, so a
reader knows every name, dtype and shape before it reads: only the hidden size is the file's to say.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from jaxtyping import Shaped
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.record.files import write_bytes
from bitassay.record.hashing import canonical_json
from bitassay.verification.container import (
    FILE_BYTES,
    HEADER_KEY,
    UNEXPECTED_BYTES,
    Entry,
    TraceError,
    is_version,
    open_regular,
    read_tensors,
)
from bitassay.verification.numerics import STATE_DTYPES
from bitassay.verification.receipts.challenge import Challenge, opened_positions
from bitassay.verification.receipts.merkle import (
    DIGEST_BYTES,
    cell_leaves,
    merkle_proof,
    merkle_root,
    proof_length,
    root_from_proof,
)
from bitassay.verification.receipts.receipt import Receipt, commitment_of, trace_leaves
from bitassay.verification.trace import HIDDEN, Expecting, Trace, check_consistent, tensor_name

PROOF = "proof"


@dataclass(frozen=True)
class Opening:
    """What is shown of a trace: states by layer at the opened positions, and the Merkle proof. commitment,
    beacon: of the challenge that it answers, in hex."""

    commitment: str
    beacon: str
    states: Mapping[int, Shaped[Tensor, "opened hidden"]]
    proof: tuple[bytes, ...]


def open_trace(trace: Trace, challenge: Challenge) -> Opening:
    """Return the opening of `trace` that answers a challenge of its receipt. Raises BitassayError where the
    trace is not the one that was committed to."""
    check_consistent(trace)
    leaves = trace_leaves(trace)
    if commitment_of(merkle_root(leaves), trace.header).hex() != challenge.commitment:
        raise BitassayError(
            "the challenge is of another trace than this one", "open the trace whose receipt was challenged"
        )
    positions = opened_positions(challenge, trace.header)
    states = {layer: trace.states[layer][list(positions)] for layer in trace.header.layers}
    indices = cell_indices(positions, len(trace.header.layers))
    return Opening(challenge.commitment, challenge.beacon, states, tuple(merkle_proof(leaves, indices)))


def cell_indices(positions: Sequence[int], n_layers: int) -> list[int]:
    """Return which leaves the cells of all layers at these positions are, where positions count from 0."""
    return [position * n_layers + layer for position, layer in product(positions, range(n_layers))]


def write_opening(path: str | Path, opening: Opening) -> None:
    """Write an opening, whole or not at all."""
    write_bytes(path, encode_opening(opening))


def encode_opening(opening: Opening) -> bytes:
    """Return the file's content."""
    content = {"opening": 1, "commitment": opening.commitment, "beacon": opening.beacon}
    tensors = {tensor_name(layer): rows.contiguous().clone() for layer, rows in opening.states.items()}
    if opening.proof:
        rows = torch.frombuffer(bytearray(b"".join(opening.proof)), dtype=torch.uint8)
        tensors[PROOF] = rows.view(-1, DIGEST_BYTES)
    return safetensors.torch.save(tensors, {HEADER_KEY: canonical_json(content)})


def read_opening(
    path: str | Path, receipt: Receipt, challenge: Challenge, expecting: Expecting | None = None
) -> Opening:
    """Read what may come from anyone as the answer to a challenge of `receipt`, and check that the receipt
    commits to it. Raises TraceError for each defect, "withheld-opening" where there is no file. expecting: as
    in `read_trace`."""
    path = Path(path)
    if not path.exists():
        raise withheld(path)
    check_challenge(receipt, challenge)
    with open_regular(path, UNEXPECTED_BYTES if expecting is None else FILE_BYTES) as stream:
        return _read(stream, receipt, challenge, path, expecting)


def decode_opening(
    data: bytes, receipt: Receipt, challenge: Challenge, path: Path, expecting: Expecting | None = None
) -> Opening:
    """Return the opening in `data`, checked as `read_opening` does; `path` is what errors name."""
    return _read(io.BytesIO(data), receipt, challenge, path, expecting)


def _read(
    stream: BinaryIO | io.BytesIO,
    receipt: Receipt,
    challenge: Challenge,
    path: Path,
    expecting: Expecting | None,
) -> Opening:
    check_challenge(receipt, challenge)
    header, positions = receipt.header, opened_positions(challenge, receipt.header)
    hashes = proof_length(receipt.n_cells, cell_indices(positions, len(header.layers)))
    names = {tensor_name(layer) for layer in header.layers} | ({PROOF} if hashes else set())

    def check(content: Any, entries: dict[str, Entry]) -> None:
        answered = {"opening": 1, "commitment": challenge.commitment, "beacon": challenge.beacon}
        if content != answered or not is_version(content["opening"], 1):
            raise TraceError("other-challenge", f"{path}: answers another challenge, or is no opening")
        if wrong := sorted(set(entries) ^ names):
            raise TraceError("wrong-layers", f"{path}: {wrong[0]!r:.80} is missing, or should not be there")
        for name, (dtype, shape) in entries.items():
            if name == PROOF:
                fits = (shape, dtype) == ([hashes, DIGEST_BYTES], "uint8")
            else:
                fits = dtype == header.numerics.dtype and len(shape) == 2
                fits = fits and shape[0] == len(positions) and 0 < shape[1] <= HIDDEN
            if not fits:
                raise TraceError("wrong-shape", f"{path}: {name} is {dtype:.20} {shape!s:.60}")
            if name != PROOF and expecting is not None:
                expecting(header, shape[1])

    _, tensors = read_tensors(stream, path, check)
    proof = tuple(bytes(row) for row in tensors.pop(PROOF, torch.empty(0)).tolist())
    states = {layer: tensors[tensor_name(layer)] for layer in header.layers}
    opening = Opening(challenge.commitment, challenge.beacon, states, proof)
    check_opening(opening, receipt, challenge, str(path))
    return opening


def withheld(where: str | Path) -> TraceError:
    """Return the defect of a challenge without an answer."""
    return TraceError("withheld-opening", f"{where}: the challenge has not been answered")


def check_challenge(receipt: Receipt, challenge: Challenge) -> None:
    """Raise TraceError unless the challenge is of this receipt and states of its dtype are known."""
    if challenge.commitment != receipt.commitment.hex():
        raise TraceError("other-receipt", "the receipt is not the one that was challenged")
    if receipt.header.numerics.dtype not in STATE_DTYPES:
        raise TraceError("wrong-dtype", f"states in {receipt.header.numerics.dtype!r}")


def check_opening(opening: Opening, receipt: Receipt, challenge: Challenge, where: str = "opening") -> None:
    """Raise the TraceError for the first way in which `opening` is not what `receipt` commits to at the
    challenged positions."""
    check_challenge(receipt, challenge)
    header, positions = receipt.header, opened_positions(challenge, receipt.header)
    if (opening.commitment, opening.beacon) != (challenge.commitment, challenge.beacon):
        raise TraceError("other-challenge", f"{where}: answers another challenge")
    if tuple(opening.states) != header.layers:
        raise TraceError("wrong-layers", f"{where}: opens layers {list(opening.states)[:8]}")
    shapes = {(rows.dtype, *rows.shape) for rows in opening.states.values()}
    known = (STATE_DTYPES[header.numerics.dtype], len(positions))
    if len(shapes) != 1 or any(shape[:2] != known or len(shape) != 3 for shape in shapes):
        raise TraceError("wrong-shape", f"{where}: not {len(positions)} states of one size in each layer")
    leaves = cell_leaves(opening.states, positions, header.numerics.dtype)
    cells = dict(zip(cell_indices(positions, len(header.layers)), leaves, strict=True))
    if root_from_proof(receipt.n_cells, cells, opening.proof) != receipt.root:
        raise TraceError("other-root", f"{where}: these states are not those that were committed to")
    if not all(rows.isfinite().all() for rows in opening.states.values()):
        raise TraceError("not-finite", f"{where}: a state has NaN or infinity")

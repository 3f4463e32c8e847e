"""The opening: the challenged cells of a committed trace, with the proof that they were committed to.

It is a safetensors file, as a trace is. Its metadata names the commitment and the beacon that it answers; a
tensor `layer.<l>` has the opened positions' states, ascending, in the declared dtype, and `proof` has the
hashes of `merkle_proof`, 32 bytes a row. What must be in it follows from receipt and challenge alone, so a
reader knows every name, dtype and shape before it reads: only the hidden size is the file's to say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from bitassay.errors import BitassayError
from bitassay.record.files import atomic_file
from bitassay.record.hashing import canonical_json
from bitassay.verification.container import (
    FILE_BYTES,
    HEADER_BYTES,
    HEADER_KEY,
    TraceError,
    check_tiling,
    declared_size,
    read_metadata,
    read_regular,
    tensor_entry,
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
from bitassay.verification.trace import (
    HIDDEN,
    Trace,
    check_consistent,
    tensor_name,
)

PROOF = "proof"


@dataclass(frozen=True)
class Opening:
    """What is shown of a trace: states by layer at the opened positions, and the Merkle proof. commitment,
    beacon: of the challenge that it answers, in hex."""

    commitment: str
    beacon: str
    states: Mapping[int, Shaped[Tensor, "opened hidden"]]
    proof: tuple[bytes, ...]


def open_trace(trace: Trace, one: Challenge) -> Opening:
    """The opening of `trace` that answers a challenge of its receipt. Raises BitassayError where the trace is
    not the one that was committed to."""
    check_consistent(trace)
    leaves = trace_leaves(trace)
    if commitment_of(merkle_root(leaves), trace.header).hex() != one.commitment:
        raise BitassayError(
            "the challenge is of another trace than this one", "open the trace whose receipt was challenged"
        )
    positions = opened_positions(one, trace.header)
    states = {layer: trace.states[layer][list(positions)] for layer in trace.header.layers}
    indices = cell_indices(positions, len(trace.header.layers))
    return Opening(one.commitment, one.beacon, states, tuple(merkle_proof(leaves, indices)))


def cell_indices(positions: Sequence[int], n_layers: int) -> list[int]:
    """Which leaves the cells of all layers at these positions are, where positions count from 0."""
    return [position * n_layers + layer for position, layer in product(positions, range(n_layers))]


def write_opening(path: str | Path, opening: Opening) -> None:
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(encode_opening(opening))


def encode_opening(opening: Opening) -> bytes:
    """The file's content."""
    content = {"opening": 1, "commitment": opening.commitment, "beacon": opening.beacon}
    tensors = {tensor_name(layer): rows.contiguous().clone() for layer, rows in opening.states.items()}
    if opening.proof:
        rows = torch.frombuffer(bytearray(b"".join(opening.proof)), dtype=torch.uint8)
        tensors[PROOF] = rows.view(-1, DIGEST_BYTES)
    return safetensors.torch.save(tensors, {HEADER_KEY: canonical_json(content)})


def read_opening(path: str | Path, receipt: Receipt, one: Challenge) -> Opening:
    """Read what may come from anyone as the answer to challenge `one` of `receipt`, and check that the
    receipt commits to it. Raises TraceError for each defect, "withheld-opening" where there is no file."""
    path = Path(path)
    if not path.exists():
        raise withheld(path)
    check_challenge(receipt, one)
    cells = len(opened_positions(one, receipt.header)) * len(receipt.header.layers)
    limit = min(FILE_BYTES, HEADER_BYTES + cells * (4 * HIDDEN + 32 * 32))
    return decode_opening(read_regular(path, limit), receipt, one, path)


def decode_opening(data: bytes, receipt: Receipt, one: Challenge, path: Path) -> Opening:
    """The opening in `data`, checked as `read_opening` says; `path` is what errors name."""
    check_challenge(receipt, one)
    declared = declared_size(data[:8], len(data), path)
    entries, content = read_metadata(data[8 : 8 + declared], path)
    if content != {"opening": 1, "commitment": one.commitment, "beacon": one.beacon}:
        raise TraceError("other-challenge", f"{path}: answers another challenge, or is no opening")
    _check_tensors(entries, receipt, one, len(data) - 8 - declared, path)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise TraceError("malformed", f"{path}: not a safetensors file ({error})") from error
    proof = tuple(bytes(row) for row in tensors.pop(PROOF, torch.empty(0)).tolist())
    states = {layer: tensors[tensor_name(layer)] for layer in receipt.header.layers}
    opening = Opening(one.commitment, one.beacon, states, proof)
    check_opening(opening, receipt, one, str(path))
    return opening


def withheld(where: str | Path) -> TraceError:
    return TraceError("withheld-opening", f"{where}: the challenge has not been answered")


def check_challenge(receipt: Receipt, one: Challenge) -> None:
    """Raise TraceError unless the challenge is of this receipt and states of its dtype are known."""
    if one.commitment != receipt.commitment.hex():
        raise TraceError("other-receipt", "the receipt is not the one that was challenged")
    if receipt.header.numerics.dtype not in STATE_DTYPES:
        raise TraceError("wrong-dtype", f"states in {receipt.header.numerics.dtype!r}")


def check_opening(opening: Opening, receipt: Receipt, one: Challenge, where: str = "opening") -> None:
    """Raise the TraceError for the first way in which `opening` is not what `receipt` commits to at the
    challenged positions."""
    check_challenge(receipt, one)
    header, positions = receipt.header, opened_positions(one, receipt.header)
    if (opening.commitment, opening.beacon) != (one.commitment, one.beacon):
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


def _check_tensors(entries: dict, receipt: Receipt, one: Challenge, data_bytes: int, path: Path) -> None:
    """Names, dtypes, shapes and offsets of all tensors, before a byte of them is read."""
    header, positions = receipt.header, opened_positions(one, receipt.header)
    hashes = proof_length(receipt.n_cells, cell_indices(positions, len(header.layers)))
    names = {tensor_name(layer) for layer in header.layers} | ({PROOF} if hashes else set())
    if wrong := sorted(set(entries) ^ names):
        raise TraceError("wrong-layers", f"{path}: {wrong[0]!r:.80} is missing, or should not be there")
    spans = []
    for name, entry in entries.items():
        shape, offsets, dtype = tensor_entry(name, entry, path)
        fits = (
            (shape, dtype) == ([hashes, DIGEST_BYTES], "U8")
            if name == PROOF
            else len(shape) == 2
            and shape[0] == len(positions)
            and 0 < shape[1] <= HIDDEN
            and str_to_torch_dtype.get(dtype, dtype) == STATE_DTYPES.get(header.numerics.dtype)
        )
        if not fits:
            raise TraceError("wrong-shape", f"{path}: {name} is {dtype:.20} {shape!s:.60}")
        if offsets[1] - offsets[0] != math.prod(shape) * str_to_torch_dtype[dtype].itemsize:
            raise TraceError("wrong-offsets", f"{path}: {name} declares bytes {offsets} for {shape}")
        spans.append(offsets)
    check_tiling(spans, data_bytes, path)

"""The opening: the challenged cells of a committed trace, with the proof that they were committed to.

It is a safetensors file, as a trace is. Its metadata names the commitment and the beacon that it answers; a
tensor `layer.<l>` has the opened positions' states, ascending, in the declared dtype, and `proof` has the
hashes of `merkle_proof`, 32 bytes a row. What must be in it follows from receipt and challenge alone, so a
reader knows every name, dtype and shape before it reads: only the hidden size is the file's to say.

To verify an opening needs the receipt (with the token ids), the challenge and the opening, not the trace: the
verifier prefills all tokens and compares the opened cells. The tokens are judged in full, the states by the
mean over opened positions. The calibration profile is that of whole traces. So it decides only if the opened
generated positions are at least as many as it was calibrated on, and the generated ones at most; and a mean
over a part spreads more than one over all, so that honest runs fail somewhat more often than alpha unless
all generated positions are opened.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.generate.decode import Prefill, prefill
from bitassay.models.load import identity
from bitassay.record.files import atomic_file
from bitassay.record.hashing import canonical_json
from bitassay.verify.challenge import Challenge, opened_positions
from bitassay.verify.container import (
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
from bitassay.verify.evidence import Evidence, layer_evidence, token_margins
from bitassay.verify.merkle import (
    DIGEST_BYTES,
    cell_leaves,
    merkle_proof,
    merkle_root,
    proof_length,
    root_from_proof,
)
from bitassay.verify.numerics import STATE_DTYPES, numerics
from bitassay.verify.profile import Profile, find_profile
from bitassay.verify.receipt import Receipt, check_signature, commitment_of, trace_leaves
from bitassay.verify.structure import Reason, Request, claim_defects, header_defects
from bitassay.verify.trace import (
    HIDDEN,
    ITEM_BYTES,
    SAFETENSORS_DTYPES,
    ModelClaim,
    Trace,
    check_consistent,
    tensor_name,
)
from bitassay.verify.verdict import Verdict, decide
from bitassay.verify.verillm import FORMAT_OF_DTYPE

PROOF = "proof"


@dataclass(frozen=True)
class Opening:
    """What is shown of a trace: states by layer at the opened positions, and the Merkle proof. commitment,
    beacon: of the challenge that it answers, in hex."""

    commitment: str
    beacon: str
    states: Mapping[int, Shaped[Tensor, "opened hidden"]]
    proof: tuple[bytes, ...]


@dataclass(frozen=True)
class OpenedEvidence(Evidence):
    """opened: generated positions whose states are part of it."""

    opened: int = 0

    @property
    def n_generated(self) -> int:
        return self.opened


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
    content = {"opening": 1, "commitment": opening.commitment, "beacon": opening.beacon}
    tensors = {tensor_name(layer): rows.contiguous().clone() for layer, rows in opening.states.items()}
    if opening.proof:
        rows = torch.frombuffer(bytearray(b"".join(opening.proof)), dtype=torch.uint8)
        tensors[PROOF] = rows.view(-1, DIGEST_BYTES)
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {HEADER_KEY: canonical_json(content)}))


def read_opening(path: str | Path, receipt: Receipt, one: Challenge) -> Opening:
    """Read what may come from anyone as the answer to challenge `one` of `receipt`, and check that the
    receipt commits to it. Raises TraceError for each defect, "withheld-opening" where there is no file."""
    path = Path(path)
    if not path.exists():
        raise TraceError("withheld-opening", f"{path}: the challenge has not been answered")
    check_challenge(receipt, one)
    cells = len(opened_positions(one, receipt.header)) * len(receipt.header.layers)
    data = read_regular(path, min(FILE_BYTES, HEADER_BYTES + cells * (4 * HIDDEN + 32 * 32)))
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


def verify_opening(
    receipt: Receipt,
    one: Challenge,
    opening: Opening,
    model: PreTrainedModel,
    *,
    signer: bytes | None,
    profile: Profile | None = None,
    alpha: float | None = None,
    request: Request | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Check a receipt and what was opened of it against the verifier's own `model`.

    one: the challenge that the verifier itself made. signer: the host's public key, as the verifier knows it
    from elsewhere; None: not known, and then there is neither a PASS nor a statistical FAIL, because anyone
    could have signed. profile: default, the one in the cache folder. request: what was asked for.
    """
    header, name = receipt.header, identity(model).name
    try:
        check_signature(receipt)
        if signer is not None and signer != receipt.key:
            raise TraceError("other-signer", f"signed by {receipt.key.hex()}, not {signer.hex()}")
        check_opening(opening, receipt, one)
    except TraceError as error:
        return Verdict("FAIL", (Reason(error.code, error.problem),), name, len(header.output_ids))
    hidden = next(iter(opening.states.values())).shape[1]
    defects = header_defects(header, model)
    if hidden != (own_hidden := model.config.get_text_config().hidden_size):
        defects.append(Reason("wrong-hidden-size", f"states of {hidden} numbers, the model has {own_hidden}"))
    if defects:
        return Verdict("FAIL", tuple(defects), name, len(header.output_ids))
    (own,) = prefill(model, [header.prompt_ids], [header.output_ids], layers=header.layers)
    evidence = opened_evidence(opening, receipt, opened_positions(one, header), own, model.dtype)
    trace = Trace(header, {})
    claims = claim_defects(trace, model, request or Request())
    if profile is None:
        profile = find_profile(
            ModelClaim.of(identity(model)), header.numerics, numerics(model), header.sampling
        )
    doubts = _doubts(receipt, signer, profile)
    return decide(trace, model, evidence, claims, profile, alpha, now, doubts)


def opened_evidence(
    opening: Opening, receipt: Receipt, positions: Sequence[int], own: Prefill, dtype: torch.dtype
) -> OpenedEvidence:
    """States at the opened positions against the verifier's own, and the margins of all tokens."""
    header = receipt.header
    n_prompt, at = sum(position < len(header.prompt_ids) for position in positions), list(positions)
    layers = tuple(
        layer_evidence(layer, rows, own.states[layer][at], n_prompt, dtype)
        for layer, rows in opening.states.items()
    )
    format = FORMAT_OF_DTYPE[str(dtype).removeprefix("torch.")]
    return OpenedEvidence(layers, token_margins(header, own), format, len(positions) - n_prompt)


def _doubts(receipt: Receipt, signer: bytes | None, profile: Profile | None) -> list[Reason]:
    found = []
    if signer is None:
        sentence = f"signed by {receipt.key.hex()}; nobody has said whose key that is"
        found.append(Reason("unknown-signer", sentence))
    if profile is not None and (n := len(receipt.header.output_ids) - 1) > profile.generated_positions[1]:
        high = profile.generated_positions[1]
        sentence = f"{n} generated positions; the profile was calibrated on at most {high}"
        found.append(Reason("beyond-profile", sentence))
    return found


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
            and SAFETENSORS_DTYPES.get(dtype) == header.numerics.dtype
        )
        if not fits:
            raise TraceError("wrong-shape", f"{path}: {name} is {dtype:.20} {shape!s:.60}")
        if offsets[1] - offsets[0] != math.prod(shape) * (ITEM_BYTES | {"U8": 1})[dtype]:
            raise TraceError("wrong-offsets", f"{path}: {name} declares bytes {offsets} for {shape}")
        spans.append(offsets)
    check_tiling(spans, data_bytes, path)

"""Prove a list of prompts into files, in chunks, so that only some traces are in memory at a time. Traces
that an interrupted run has finished are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from transformers import PreTrainedModel

from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import NonceSampler, Sampler
from bitassay.errors import BitassayError
from bitassay.models.identity import Identity, identity, tokenizer
from bitassay.record.files import read_json, write_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.container import FILE_BYTES, TraceError
from bitassay.verification.numerics import numerics
from bitassay.verification.prove import BATCH, prove_many
from bitassay.verification.receipts.proof import sign_proof, write_proof
from bitassay.verification.receipts.receipt import commit, write_receipt
from bitassay.verification.trace import ModelClaim, Sampling, Trace, read_trace, write_trace

CHUNK = 64  # traces in memory at a time


class PromptFile(NamedTuple):
    """A prompt, its nonce, and the file of its trace."""

    path: Path
    prompt: str
    nonce: str


def prove_files(
    model: PreTrainedModel,
    requests: Sequence[PromptFile],
    *,
    sampler: Sampler,
    max_new_tokens: int,
    claim: Identity | None = None,
    batch_size: int = BATCH,
    folder: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Prove each prompt into its file and return a row for each.

    folder: where the files are, if traces of an earlier run are to be kept. Raises BitassayError where that
    run had another model, claim or sampling; traces cannot tell this themselves, since a header is a claim.
    """
    claim = claim or identity(model)
    rows: dict[Path, dict[str, Any]] = {}
    if folder is not None:
        run = {
            "ran": ModelClaim.of(identity(model)).model_dump(),
            "claimed": ModelClaim.of(claim).model_dump(),
            "numerics": numerics(model).model_dump(),
            "sampling": Sampling.of(sampler, max_new_tokens).model_dump(),
        }
        if isinstance(sampler, NonceSampler):
            run["sampling"]["seed"] = "nonce"
        path = folder / "prove.json"
        if path.is_file() and read_json(path) != run:
            raise BitassayError(
                f"{folder} holds traces of another run (see {path.name})",
                "choose another --out, or remove this one",
            )
        write_json(path, run)
        rows = {request.path: row for request in requests if (row := _finished_row(model, request))}
    missing = [request for request in requests if request.path not in rows]
    for start in range(0, len(missing), batch_size):
        progress("proving", len(rows), len(requests))
        chunk = missing[start : start + batch_size]
        traces = prove_many(
            model,
            [request.prompt for request in chunk],
            nonces=[request.nonce for request in chunk],
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            claim=claim,
            batch_size=batch_size,
        )
        for request, trace in zip(chunk, traces, strict=True):
            write_trace(request.path, trace)
            rows[request.path] = _row(model, request.path, trace)
    progress("proving", len(requests), len(requests))
    return [rows[request.path] for request in requests]


def _finished_row(model: PreTrainedModel, request: PromptFile) -> dict[str, Any] | None:
    """Return the row of an earlier run's trace; None where it is missing, damaged or of another request."""
    if not request.path.exists():
        return None
    try:
        trace = read_trace(request.path, limit_bytes=FILE_BYTES)
    except TraceError:
        return None
    wanted = (request.nonce, encode_prompt(model, request.prompt))
    is_finished = (trace.header.nonce, trace.header.prompt_ids) == wanted
    return _row(model, request.path, trace) if is_finished else None


def _row(model: PreTrainedModel, path: Path, trace: Trace) -> dict[str, Any]:
    return {
        "trace": str(path),
        "prompt_tokens": trace.n_prompt,
        "output_tokens": trace.n_tokens,
        "nonce": trace.header.nonce,
        "text": tokenizer(model).decode(list(trace.header.output_ids), skip_special_tokens=True),
    }


def write_receipts(
    rows: Sequence[dict[str, Any]], key: Ed25519PrivateKey, proof: int | None = None
) -> list[dict[str, Any]]:
    """Write a receipt next to each trace, and return the rows with its path, its size and the public key.
    proof: the bytes a token of the small proof that goes with it; None: none."""
    done = []
    for row in rows:
        trace = read_trace(Path(row["trace"]), limit_bytes=FILE_BYTES)
        path, receipt = Path(row["trace"]).with_suffix(".receipt"), commit(trace, key)
        write_receipt(path, receipt)
        added = {"receipt": str(path), "receipt_bytes": path.stat().st_size, "public_key": receipt.key.hex()}
        if proof is not None:
            added["proof"] = str(path.with_suffix(".proof"))
            write_proof(added["proof"], sign_proof(trace, receipt, key, proof))
        done.append(row | added)
    return done

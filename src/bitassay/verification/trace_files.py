"""Traces as files: prove a list of prompts into them, and judge those that a host sent, alone and together.

Both work in chunks, so that only some traces are in memory at a time. `prove_files` keeps the traces that an
interrupted run has finished. `verify_files` also keeps the evidence of one host over many calls, in a ledger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from transformers import PreTrainedModel

from bitassay.data.corpora import prompts_from
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import Sampler
from bitassay.errors import BitassayError
from bitassay.models.identity import Identity, identity, tokenizer
from bitassay.record.files import read_json, write_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.container import TraceError
from bitassay.verification.ledger import Line, extended, scored, update_ledger
from bitassay.verification.numerics import numerics
from bitassay.verification.pooled import PooledVerdict, pooled_verdict
from bitassay.verification.profile import ALPHA, Profile
from bitassay.verification.proofs import verify_proof
from bitassay.verification.prove import BATCH, prove_many
from bitassay.verification.receipts.challenge import Challenge
from bitassay.verification.receipts.opening import read_opening
from bitassay.verification.receipts.proof import read_proof, sign_proof, write_proof
from bitassay.verification.receipts.receipt import commit, read_receipt, write_receipt
from bitassay.verification.sequential import SequentialEvidence
from bitassay.verification.structure import Request
from bitassay.verification.trace import ModelClaim, Sampling, Trace, read_trace, write_trace
from bitassay.verification.verdict import Verdict, failed, verify_many, verify_opening

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
        trace = read_trace(request.path)
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
        trace = read_trace(Path(row["trace"]))
        path, receipt = Path(row["trace"]).with_suffix(".receipt"), commit(trace, key)
        write_receipt(path, receipt)
        added = {"receipt": str(path), "receipt_bytes": path.stat().st_size, "public_key": receipt.key.hex()}
        if proof is not None:
            added["proof"] = str(path.with_suffix(".proof"))
            write_proof(added["proof"], sign_proof(trace, receipt, key, proof))
        done.append(row | added)
    return done


@dataclass(frozen=True)
class SignedRequest:
    """The host's signed receipt, the key that the verifier knows as the host's, and either the verifier's own
    challenge or the host's small proof."""

    path: Path
    signer: bytes | None
    challenge: Challenge | None = None
    proof: Path | None = None


@dataclass(frozen=True)
class FilesVerdict:
    """A verdict for each file, and what all of them say as a set and in sequence (None: nothing could be
    scored)."""

    verdicts: list[Verdict]
    pooled: PooledVerdict
    sequential: SequentialEvidence | None

    @property
    def passed(self) -> bool:
        """Return whether every file passes and the sequence raises no alarm."""
        is_alarm = self.sequential is not None and bool(self.sequential.alarm_at)
        return not is_alarm and all(verdict.status == "PASS" for verdict in self.verdicts)


def expected_requests(
    count: int, prompt: str | None, prompts: Path | None, nonce: str | None, max_new_tokens: int | None
) -> list[Request]:
    """Return what was requested of each of `count` traces: the same of all, or by a file of prompts, whose
    numbers are appended to the nonce. Raises BitassayError where there is not one prompt a trace."""
    if prompts is None:
        return [Request(prompt, nonce, None, max_new_tokens)] * count
    texts = prompts_from(prompts)
    if prompt is not None or len(texts) != count:
        raise BitassayError(
            f"--prompts names {len(texts)} prompts for {count} traces", "one prompt a trace, and no --prompt"
        )
    nonces = [None if nonce is None else f"{nonce}-{index}" for index in range(count)]
    return [Request(text, word, None, max_new_tokens) for text, word in zip(texts, nonces, strict=True)]


def verify_files(
    paths: Sequence[Path],
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    name: str,
    receipt: SignedRequest | None = None,
    profile: Profile | None = None,
    alpha: float | None = None,
    ledger: Path | None = None,
    host: str | None = None,
    progress: Progress = silent,
) -> FilesVerdict:
    """Judge trace files, or with `receipt` one opening or the receipt's proof, against `model`, which is
    called `name` in verdicts.

    A file that cannot be read is a FAIL. ledger: keeps the scores of `host` over many calls; its sequence
    then includes the earlier requests.
    """
    verdicts: list[Verdict] = []
    lines: list[Line] = []
    scale: Profile | None = None
    for start in range(0, len(paths), CHUNK):
        chunk = slice(start, start + CHUNK)
        if receipt is None:
            options = {"profile": profile, "alpha": alpha, "progress": progress}
            judged = _verify_traces(paths[chunk], model, name, requests[chunk], options)
        else:
            options = {"profile": profile, "alpha": alpha, "signer": receipt.signer, "request": requests[0]}
            judged = [_verify_signed_files(paths[0], receipt, model, name, options)]
        verdicts += judged
        scale = scale or next((verdict.calibration for verdict in judged if verdict.calibration), None)
        if scale:
            scores = scored(judged, scale)
            lines = update_ledger(ledger, scores, scale, host) if ledger else extended(lines, scores, scale)
    level = alpha or (scale.alpha if scale else ALPHA)
    wealth = np.array([line.log_wealth for line in lines])
    sequential = SequentialEvidence.of(wealth, level) if lines else None
    return FilesVerdict(verdicts, pooled_verdict(verdicts, level), sequential)


def _verify_traces(
    paths: Sequence[Path],
    model: PreTrainedModel,
    name: str,
    requests: Sequence[Request],
    options: dict[str, Any],
) -> list[Verdict]:
    verdicts, readable = {}, {}
    for index, path in enumerate(paths):
        try:
            readable[index] = read_trace(path)
        except TraceError as error:
            verdicts[index] = failed(error, name)
    requested = [requests[index] for index in readable]
    checked = verify_many(list(readable.values()), model, requests=requested, **options)
    verdicts |= dict(zip(readable, checked, strict=True))
    return [verdicts[index] for index in range(len(paths))]


def _verify_signed_files(
    opening: Path, receipt: SignedRequest, model: PreTrainedModel, name: str, options: dict[str, Any]
) -> Verdict:
    try:
        signed = read_receipt(receipt.path)
        if receipt.proof is not None:
            return verify_proof(signed, read_proof(receipt.proof, signed), model, **options)
        assert receipt.challenge is not None
        opened = read_opening(opening, signed, receipt.challenge)
    except TraceError as error:
        return failed(error, name)
    return verify_opening(signed, receipt.challenge, opened, model, **options)

"""Judge the traces that a host sent as files, alone and together, in chunks, so that only some are in memory
at a time. The evidence of one host over many calls is kept in a ledger; `accounting.py` says what counts, and
`decision.py` what follows for the whole call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitassay.engines.prompts import encode_prompt
from bitassay.models.identity import identity
from bitassay.models.source import cache_folder
from bitassay.record.progress import Progress, silent
from bitassay.verification.accounting import (
    UNANSWERED,
    Answer,
    Standing,
    compared_with,
    is_hosts_doing,
    prompt_digest,
    request_digest,
    standings,
)
from bitassay.verification.asked import Asked, SignedRequest
from bitassay.verification.container import TraceError
from bitassay.verification.decision import SEQUENCE, SET, UNDECIDED, Decision, decision
from bitassay.verification.ledger import (
    BUDGET,
    Binding,
    Item,
    Line,
    extended,
    read_ledger,
    score_evidence,
    undecided_evidence,
    update_ledger,
)
from bitassay.verification.numerics import numerics
from bitassay.verification.pooled import PooledVerdict, pooled_verdict
from bitassay.verification.profile import ALPHA, Profile, read_profile
from bitassay.verification.proofs import verify_proof
from bitassay.verification.receipts.opening import read_opening
from bitassay.verification.receipts.proof import read_proof
from bitassay.verification.receipts.receipt import read_receipt
from bitassay.verification.scores import checked_alpha
from bitassay.verification.sequential import SequentialEvidence
from bitassay.verification.spot import verify_segments
from bitassay.verification.structure import Reason, Request, expecting
from bitassay.verification.trace import Expecting, Header, ModelClaim, Sampling, Trace, read_trace
from bitassay.verification.verdict import Verdict
from bitassay.verification.verify import failed, verify_many, verify_opening

CHUNK = 64  # traces in memory at a time


@dataclass(frozen=True)
class FilesVerdict:
    """A verdict for each file with what else there is to say of it, and what all of them say: as a set, in
    sequence (None: nothing could be scored), by the requests without a decision, and in the end."""

    verdicts: list[Verdict]
    notes: list[tuple[str, ...]]
    pooled: PooledVerdict | None
    sequential: SequentialEvidence | None
    undecided: SequentialEvidence | None
    decision: Decision

    @property
    def passed(self) -> bool:
        """Return whether the decision about all of them is PASS."""
        return self.decision.status == "PASS"


@dataclass(frozen=True)
class Keeping:
    """Where the evidence about one host is kept: the ledger's file (None: nowhere), the host's public key in
    hex where it signs, and the rate of undecided requests that is taken as an honest host's."""

    ledger: Path | None = None
    host: str | None = None
    budget: float = BUDGET


def verify_files(
    paths: Sequence[Path],
    model: PreTrainedModel,
    asked: Asked,
    *,
    name: str,
    receipt: SignedRequest | None = None,
    profile: Profile | None = None,
    alpha: float | None = None,
    keeping: Keeping = Keeping(),
    segments: int | None = None,
    progress: Progress = silent,
) -> FilesVerdict:
    """Judge trace files, or with `receipt` one opening or the receipt's proof, against `model`, which is
    called `name` in verdicts.

    A file that cannot be read is a FAIL. keeping: of a ledger, whose sequence then includes the earlier
    requests. segments: of traces, check so many segments of layers alone (`spot.py`); not with a ledger.
    """
    assert segments is None or keeping.ledger is None
    account = _Account(model, asked, keeping, profile)
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        options: dict[str, Any] = {"profile": profile, "alpha": alpha}
        if receipt is None:
            options |= {"progress": progress}
            judged = _verify_traces(chunk, start, model, name, asked, segments, options)
        else:
            judged = [_verify_signed_files(chunk[0], receipt, model, name, asked.requests[0], options)]
        account.enter(judged)
    account.close()
    return account.result([str(path) for path in paths], alpha)


class _Account:
    """What has been judged so far, and what of it is evidence."""

    def __init__(self, model: PreTrainedModel, asked: Asked, keeping: Keeping, profile: Profile | None):
        self.model, self.asked, self.keeping = model, asked, keeping
        self.verdicts: list[Verdict] = []
        self.answers: list[Answer | None] = []
        self.missing: list[Item] = []
        self.lines: list[Line] = []
        bound = None
        if keeping.ledger is not None:
            bound, self.lines = read_ledger(keeping.ledger, profile, keeping.host, keeping.budget)
        self.before = {line.request for line in self.lines}
        self.scale = profile or (bound and kept_profile(bound.profile))

    def enter(self, judged: Sequence[tuple[Answer | None, Verdict]]) -> None:
        for answer, verdict in judged:
            self.answers.append(answer)
            self.verdicts.append(verdict)
        calibrations = (verdict.calibration for verdict in self.verdicts)
        self.scale = self.scale or next(filter(None, calibrations), None)
        self._keep(self._items())

    def close(self) -> None:
        """Enter what did not come."""
        claim = ModelClaim.of(identity(self.model))
        for request in self.asked.missing(self.answers):
            assert request.prompt is not None
            ids, limit = encode_prompt(self.model, request.prompt), request.max_new_tokens
            sampling = Sampling.of(request.sampler, limit) if request.sampler and limit else None
            digest = request_digest(claim, request.nonce, ids, sampling)
            self.missing.append(Item(request=digest, prompt=prompt_digest(ids), undecided=UNANSWERED))
        self.missing += [Item(undecided=UNANSWERED)] * self.asked.unanswered
        self._keep(self.missing)

    def _keep(self, items: list[Item]) -> None:
        ledger, scale = self.keeping.ledger, self.scale
        if ledger is None:
            self.lines = extended(self.lines, items)
        elif scale is not None and items:
            binding = Binding(profile=scale.digest, host=self.keeping.host, budget=self.keeping.budget)
            self.lines = update_ledger(ledger, items, binding)

    def _items(self) -> list[Item]:
        """What the files are in a ledger, in their order; of those that count in one."""
        digest, items = self.scale and self.scale.digest, []
        for answer, verdict in zip(self.answers, self.verdicts, strict=True):
            if answer is None or verdict.structural:
                continue
            named = {name: getattr(answer, name) for name in ("request", "prompt", "output", "commitment")}
            if verdict.ranked is not None and verdict.p_value is not None and verdict.profile == digest:
                items.append(Item(**named, score=verdict.ranked, limit=verdict.limit))
            elif self._is_hosts_doing(answer, verdict):
                items.append(Item(**named, undecided=verdict.reasons[0].code))
        return items

    def _is_hosts_doing(self, answer: Answer | None, verdict: Verdict) -> bool:
        if self.scale is None or answer is None:
            return False
        return is_hosts_doing(verdict, answer.header, self.scale, numerics(self.model))

    def result(self, names: Sequence[str], alpha: float | None) -> FilesVerdict:
        level = (self.scale.alpha if self.scale else ALPHA) if alpha is None else checked_alpha(alpha)
        found = self._standings(names)
        verdicts = [
            replace(verdict, status="FAIL", reasons=(Reason("equivocation", standing.note or ""),))
            if standing.is_fault
            else verdict
            for verdict, standing in zip(self.verdicts, found, strict=True)
        ]
        judged = list(zip(self.answers, verdicts, found, strict=True))
        counted = [verdict for _, verdict, standing in judged if standing.counts]
        pool = [verdict for _, verdict, standing in judged if standing.counts and standing.scores]
        scored = [verdict for verdict in pool if verdict.p_value is not None]
        waiting = [
            verdict
            for answer, verdict, standing in judged
            if standing.counts
            and verdict.status == "INCONCLUSIVE"
            and not self._is_hosts_doing(answer, verdict)
        ]
        sequential = self.scale and score_evidence(self.lines, self.scale.honest_scores, SEQUENCE * level)
        undecided = undecided_evidence(self.lines, self.keeping.budget, UNDECIDED * level)
        outcome = decision(
            counted,
            scored,
            sequential,
            undecided,
            waiting,
            level,
            self.keeping.budget,
            unanswered=len(self.missing),
            with_ledger=self.keeping.ledger is not None,
        )
        notes = [self._notes(index, standing) for index, standing in enumerate(found)]
        pooled = pooled_verdict(pool, level if len(scored) < 2 else SET * level) if pool else None
        return FilesVerdict(verdicts, notes, pooled, sequential, undecided, outcome)

    def _standings(self, names: Sequence[str]) -> list[Standing]:
        """What each file counts for, in this call and against what the ledger had."""
        found = standings(self.answers, self.verdicts, names)
        kept = {line.request: line for line in self.lines if line.request in self.before and line.output}
        for index, answer in enumerate(self.answers):
            if answer is None or not found[index].counts or (line := kept.get(answer.request)) is None:
                continue
            if answer.commitment != line.commitment or answer.output != line.output:
                found[index] = compared_with(answer, line.output, line.commitment, "the ledger's")
        return found

    def _notes(self, index: int, standing: Standing) -> tuple[str, ...]:
        answer = self.answers[index]
        notes = [standing.note] if standing.note and not standing.is_fault else []
        if answer is not None and self.asked.request(index, answer.header.nonce).sampler is None:
            chosen = answer.header.sampling
            says = f"temperature {chosen.temperature:g}, top-p {chosen.top_p:g}, seed {chosen.seed}"
            notes.append(f"sampler not checked ({says if chosen.sampler != 'greedy' else 'greedy'})")
        return tuple(notes)


def _verify_traces(
    paths: Sequence[Path],
    first: int,
    model: PreTrainedModel,
    name: str,
    asked: Asked,
    segments: int | None,
    options: dict[str, Any],
) -> list[tuple[Answer | None, Verdict]]:
    """Judge some of the files, of which the one at `first` is the first."""
    verdicts: dict[int, Verdict] = {}
    readable: dict[int, Trace] = {}
    answers: dict[int, Answer] = {}
    requests: dict[int, Request] = {}

    def answering(index: int) -> Expecting:
        def check(header: Header, hidden: int) -> None:
            answers[index] = Answer.of(header)
            requests[index] = asked.request(first + index, header.nonce)
            expecting(model, requests[index])(header, hidden)

        return check

    for index, path in enumerate(paths):
        try:
            readable[index] = read_trace(path, answering(index))
        except TraceError as error:
            verdicts[index] = failed(error, name)
    options |= {"requests": [requests[index] for index in readable]}
    traces = list(readable.values())
    if segments is None:
        checked = verify_many(traces, model, **options)
    else:
        checked = verify_segments(traces, model, segments, **options)
    verdicts |= dict(zip(readable, checked, strict=True))
    return [(answers.get(index), verdicts[index]) for index in range(len(paths))]


def _verify_signed_files(
    opening: Path,
    receipt: SignedRequest,
    model: PreTrainedModel,
    name: str,
    request: Request,
    options: dict[str, Any],
) -> tuple[Answer | None, Verdict]:
    answer = None
    try:
        signed = read_receipt(receipt.path)
        is_known = signed.key == receipt.signer
        answer = Answer.of(signed.header, signed.commitment if is_known else None)
        if receipt.proof is not None:
            proof = read_proof(receipt.proof, signed)
            judged = verify_proof(signed, proof, model, signer=receipt.signer, request=request, **options)
            return answer, judged
        assert receipt.challenge is not None
        opened = read_opening(opening, signed, receipt.challenge, expecting(model, request))
    except TraceError as error:
        return answer, failed(error, name)
    return answer, verify_opening(
        signed, receipt.challenge, opened, model, signer=receipt.signer, request=request, **options
    )


def kept_profile(digest: str) -> Profile | None:
    """Return the profile with this digest from the cache folder; None where it is not there."""
    for path in sorted((cache_folder() / "profiles").glob("*.json")):
        profile = read_profile(path)
        if profile.digest == digest:
            return profile
    return None

"""Judge a recorded audit again: from the answers that its folder keeps, without any request.

The folder may come from anyone. What it says is checked as a server's answer would be: sizes, types, ids
inside the vocabulary, finite log-probabilities not above 0, and that the prompts are those that the texts
make. Statistics, calibration, receipts and decision are computed afresh; nothing of its scores or its
run.json is read. Whether the server gave these answers a folder cannot show, but for those with receipts.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from bitassay.audit.asking import Asking, Text, prompt_of
from bitassay.audit.client import AnswerError, Endpoint, Target, checked_url
from bitassay.audit.distance import Level
from bitassay.audit.judge import AuditProfile, Reference, read_audit_profile
from bitassay.audit.run import check_first, conclude
from bitassay.audit.session import Options, Session, checked_receipt
from bitassay.audit.suspects import NOBODY, Suspect
from bitassay.audit.wire import MOST_TOKENS, Answered, Id, Part, Position, Vocabulary
from bitassay.engines.decode import vocabulary_size
from bitassay.errors import BitassayError
from bitassay.models.identity import identity, tokenizer
from bitassay.record.files import explained, read_json
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import open_run_folder, run_plan
from bitassay.verification.container import first_defect
from bitassay.verification.trace import ModelClaim

FOLDER_BYTES = 2**30
REMEDY = "the folder of an audit, as `bitassay audit URL --out FOLDER` writes it"
Ids = Annotated[list[Id], Field(max_length=MOST_TOKENS)]
Count = Annotated[int, Field(ge=1, le=2**16)]
Line = Annotated[str, Field(max_length=2048)]


class Recorded(Part):
    """The plan of a recorded audit, as far as it says what was asked."""

    kind: Literal["audit"]
    url: Line
    model: Line
    reference: ModelClaim
    corpus: Line
    tokens: Count
    requests: Count
    calibration_requests: Count
    k: Count
    level: Level | None
    alpha: Annotated[float, Field(gt=0, lt=1)]
    honest: Annotated[list[tuple[Line, Line]], Field(max_length=64)]
    seed: int


class _Row(Part):
    evidence: Line
    given: bool
    detail: Line


class _Probe(Part):
    asking: Asking
    rows: Annotated[list[_Row], Field(max_length=64)]

    @model_validator(mode="after")
    def _has_evidence(self) -> "_Probe":
        asking, generates = self.asking, self.asking.through == "generation"
        if generates == asking.level.startswith("prompt-") or not (asking.new_tokens if generates else 1):
            raise ValueError("a level of evidence that was not asked for")
        if not asking.prompt_tokens or (asking.level.endswith("logprobs") and not asking.k):
            raise ValueError("no token of a prompt, or no log-probability, was asked for")
        return self


class _Receipt(Part):
    content: Annotated[str, Field(max_length=2**22)]


_Positions = Annotated[list[Position], Field(max_length=MOST_TOKENS)] | None


class _Answer(Part):
    prompt_ids: Ids
    error: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    problem: Line = ""
    text: Annotated[str, Field(max_length=2**24)] = ""
    output: _Positions = None
    prompt: _Positions = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    fingerprint: Line | None = None
    receipt: _Receipt | None = None


class NeverAsked(Endpoint):
    """Stands where the endpoint of a recorded server was: has its URL, and asks nothing."""

    def __init__(self, url: str) -> None:
        self.url = checked_url(url)

    def _patiently(self, method: str, path: str, body: dict[str, Any] | None, kind: str = "") -> Any:
        raise BitassayError("an answer of the recorded audit is missing", REMEDY)


def read_recorded(folder: Path) -> Recorded:
    """Return what a recorded audit was. Raises BitassayError for a folder that holds none."""
    if not (folder / "plan.json").is_file():
        raise BitassayError(f"{folder}: holds no plan.json, so it is no recorded audit", REMEDY)
    return valid(Recorded, folder / "plan.json")


def replay(
    recorded: Path,
    reference: Reference,
    *,
    alpha: float | None = None,
    profile: AuditProfile | None = None,
    ledger: Path | None = None,
    suspects: dict[str, Suspect] | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Return the run of a recorded audit, judged now, and its folder. alpha, profile: default: those of the
    recording, or its honest answers. Raises BitassayError for what is not as an audit writes it, a reference
    with another tokenizer, and a profile of another reference."""
    was, claim = read_recorded(recorded), ModelClaim.of(identity(reference.exact))
    if claim.tokenizer_digest != was.reference.tokenizer_digest:
        raise BitassayError(
            f"{recorded}: was recorded with the tokens of {was.reference.name}, not of {claim.name}",
            f"--reference {was.reference.name}",
        )
    vocabulary = Vocabulary(tokenizer(reference.exact), vocabulary_size(reference.exact))
    files = Files(recorded, was, vocabulary)
    honest = [Target(NeverAsked(url), model) for url, model in was.honest]
    if profile is not None or not all(
        files.has(index, was.calibration_requests) for index in range(1, len(honest) + 1)
    ):
        honest = []
    if profile is None and not honest and (recorded / "profile.json").is_file():
        profile = read_audit_profile(recorded / "profile.json")
    if profile is not None:
        profile.check(claim, was.corpus, is_recorded=True)
    options = Options(
        corpus=was.corpus,
        tokens=was.tokens,
        requests=was.requests,
        calibration_requests=was.calibration_requests,
        k=was.k,
        level=was.level,
        alpha=was.alpha if alpha is None else alpha,
        ledger=ledger,
    )
    check_first(reference, options, honest, profile)
    parts = files.parts(len(honest))
    work = {
        "replays": digest_json([was.model_dump(mode="json"), parts]),
        "reference": claim.model_dump(mode="json"),
        "corpus": was.corpus,
        "alpha": options.alpha,
        "profile": profile and profile.digest,
        "seed": was.seed,
    }
    plan = run_plan("audit", work)
    folder = open_run_folder("audit-replay", plan, out)
    for name, value in parts.items():
        folder.part(name, lambda value=value: value)
    target = Target(NeverAsked(was.url), was.model)
    session = Session(reference, options, folder, progress)
    return conclude(session, target, honest, profile, suspects or NOBODY), folder.path


class Files:
    """The parts of a recorded audit, each checked as it is read. Raises BitassayError for what no audit
    writes."""

    def __init__(self, folder: Path, was: Recorded, vocabulary: Vocabulary) -> None:
        self.folder, self.was, self.vocabulary = folder / "parts", was, vocabulary
        with explained(self.folder):
            size = sum(path.stat().st_size for path in self.folder.glob("*.json"))
        if size > FOLDER_BYTES:
            raise BitassayError(f"{self.folder}: {size} bytes, more than {FOLDER_BYTES}", REMEDY)

    def asking(self, index: int = 0) -> Asking:
        """Return how a server was asked."""
        return valid(_Probe, self.folder / f"probe-{index}.json").asking

    def has(self, index: int, count: int) -> bool:
        """Return whether all answers of a server are there."""
        return all((self.folder / f"answer-{index}-{n:05d}.json").is_file() for n in range(count))

    def parts(self, honest: int) -> dict[str, Any]:
        """Return all parts that a replay needs, by name."""
        found: dict[str, Any] = {}
        for index in range(honest + 1):
            name = "honest" if index else "audited"
            count = self.was.calibration_requests if index else self.was.requests
            probe = valid(_Probe, self.folder / f"probe-{index}.json")
            texts = valid(list[Text], self.folder / f"texts-{name}.json")
            if len(texts) < count:
                raise BitassayError(f"{self.folder}: {len(texts)} texts for {count} requests", REMEDY)
            found[f"probe-{index}"] = probe.model_dump()
            found[f"texts-{name}"] = [asdict(text) for text in texts]
            for number, text in enumerate(texts[:count]):
                key = f"answer-{index}-{number:05d}"
                expected = prompt_of(text, probe.asking.form, self.vocabulary.tokenizer)
                found[key] = self._answer(self.folder / f"{key}.json", expected, probe.asking.level == "text")
        return found

    def _answer(self, path: Path, prompt: tuple[int, ...], is_text: bool) -> dict[str, Any]:
        answer = valid(_Answer, path)
        if tuple(answer.prompt_ids) != prompt:
            raise BitassayError(f"{path}: an answer to another prompt than the text makes", REMEDY)
        positions = [*(answer.output or ()), *(answer.prompt or ())]
        try:
            for token in [*prompt, *(t for p in positions for t in (p.token, *(each[0] for each in p.top)))]:
                self.vocabulary.checked(token)
        except AnswerError as error:
            raise BitassayError(f"{path}: {error.problem}", REMEDY) from error
        if answer.prompt is not None and tuple(each.token for each in answer.prompt) != prompt[1:]:
            raise BitassayError(f"{path}: log-probabilities of another prompt", REMEDY)
        kept: dict[str, Any] = {"prompt_ids": answer.prompt_ids}
        if answer.error is not None:
            return kept | {"error": answer.error, "problem": answer.problem}
        said = answer.model_dump(exclude={"prompt_ids", "error", "problem", "receipt"})
        output = tuple(Position(each.token) for each in answer.output or ())
        content = answer.receipt and answer.receipt.content
        signed = Answered("", None if is_text else output, None, None, None, None, content)
        return kept | said | {"receipt": checked_receipt(signed, prompt)}


def valid(kind: Any, path: Path) -> Any:
    """Return the value of a JSON file that may come from anyone, as `kind`. Raises BitassayError."""
    if not path.is_file():
        raise BitassayError(f"{path}: is missing", REMEDY)
    try:
        return TypeAdapter(kind).validate_json(_plain(path), strict=True)
    except ValidationError as error:
        raise BitassayError(f"{path}: not as an audit writes it: {first_defect(error)}", REMEDY) from error


def _plain(path: Path) -> bytes:
    """The JSON of a file: its size is bounded, and it is checked for doubled keys."""
    return json.dumps(read_json(path)).encode()

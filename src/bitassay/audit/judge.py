"""Judge answers: statistics against the reference, a profile of honest servers, p-values, one decision.

A profile holds the statistic of each of n texts as honest servers answered them; of several servers the
largest, so that a host that is like any of them is not refused. Another honest answer to another text is
exchangeable with these, or lower, so

    p = (1 + number of honest statistics at least as large) / (n + 1)

is a p-value of one answer. Those of several answers are tested as a set: their sum, which sees a host that
changes every answer, and how many of them are at most alpha, which sees one that changes few (both exact,
`verification/pooled.py`); each has half of what the set has. A ledger adds the test that may be looked at for
ever (`verification/sequential.py`) and gets half of alpha; the set has the rest, or all of it.

What the guarantee needs: texts like those of calibration, and a server whose engine, flags and precision are
those of one that was calibrated. It is an average over calibrations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float64
from pydantic import Field, ValidationError
from transformers import PreTrainedModel

from bitassay.audit.asking import Asking
from bitassay.audit.client import AnswerError
from bitassay.audit.distance import GREEDY, LEAST, Level, as_said, distances, statistic
from bitassay.audit.surprise import ASKED, surprises
from bitassay.audit.wire import Position
from bitassay.engines.engine import engine_of
from bitassay.errors import BitassayError
from bitassay.models.precision import exact
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json
from bitassay.record.schema import Fields
from bitassay.verification.container import first_defect
from bitassay.verification.ledger import Line, score_evidence
from bitassay.verification.pooled import fail_count, pooled_p_value
from bitassay.verification.scores import p_value, runs_needed
from bitassay.verification.sequential import SequentialEvidence
from bitassay.verification.trace import ModelClaim

SHORTEST = 0.5  # of the positions that were asked for, below which an answer is not judged
EXPIRES_DAYS = 90
NOT_FINITE = "the reference's own log-probabilities are not finite"
UNDECIDED = 0.1  # the share of answers without a statistic that leaves an audit without a decision


@dataclass(frozen=True)
class Reference:
    """The model that should answer: in float32, which judges, and in bfloat16, which is the control."""

    exact: PreTrainedModel
    control: PreTrainedModel

    def rows(
        self, model: PreTrainedModel, ids: Sequence[int], start: int
    ) -> Float64[np.ndarray, "positions vocabulary"]:
        """Return the log-probabilities behind which the tokens from `start` on come."""
        (read,) = engine_of(model).prefill([ids[:start]], [ids[start:]])
        return exact(read.logits).log_softmax(-1).cpu().numpy()


@dataclass(frozen=True)
class Measured:
    """One answer: mean distances of server and control in nats, and the statistic. Of sampled tokens, whose
    surprise is judged: its mean excess, and the standard error that it has by the reference."""

    positions: int
    distance: float
    control: float
    score: float


def measure(
    reference: Reference, asking: Asking, prompt: Sequence[int], said: Sequence[Position], first: int = 0
) -> Measured:
    """Return the statistic of an answer. said: positions of the prompt from its second token on, or of the
    output; first: of `said`, to leave out. Raises AnswerError for too few or too many
    positions."""
    if len(said) < max(SHORTEST * asking.positions, 1):
        raise AnswerError("too-short", f"{len(said)} of {asking.positions} positions")
    if len(said) > asking.positions:
        raise AnswerError("too-long", f"{len(said)} positions where {asking.positions} were asked for")
    tokens = [each.token for each in said]
    ids, start = asking.read_as(prompt, tokens)
    level, k = asking.level, asking.k
    if level not in (*GREEDY, "sampled") and any(each.logprob is None for each in said):
        raise AnswerError("malformed", "a token without its log-probability")
    if level in ("logprobs", "prompt-logprobs") and any(len(each.top) < k for each in said):
        raise AnswerError("malformed", f"fewer than {k} log-probabilities at a position")
    exact_rows = reference.rows(reference.exact, ids, start)
    if level == "sampled":
        found, mean, variance = (each[first:] for each in surprises(tokens, exact_rows, ASKED))
        excess, error = float((found - mean).mean()), float(variance.sum()) ** 0.5 / len(found)
        if not math.isfinite(excess):
            raise BitassayError(NOT_FINITE, "another --reference")
        return Measured(len(said), excess, error, excess / (error + LEAST))
    control_rows = reference.rows(reference.control, ids, start)
    means = [
        float(distances(level, each, exact_rows, k)[first:].mean())
        for each in (said, as_said(level, tokens, control_rows, k))
    ]
    if not all(map(math.isfinite, means)):
        raise BitassayError(NOT_FINITE, "another --reference")
    return Measured(len(said), means[0], means[1], statistic(level, *means))


class AuditProfile(Fields):
    """What honest servers' answers look like. servers: their URLs. scores: of each text, the largest over the
    servers. Dates are in UTC."""

    schema_version: Literal[1] = 1
    kind: Literal["audit profile"] = "audit profile"
    reference: ModelClaim
    level: Level
    form: str = Field(max_length=8)
    k: int = Field(ge=0, le=2**16)
    positions: int = Field(ge=1, le=2**16)
    corpus: str = Field(max_length=512)
    servers: tuple[Annotated[str, Field(max_length=2048)], ...] = Field(min_length=1, max_length=64)
    scores: tuple[Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)], ...] = Field(
        min_length=1, max_length=10**5
    )
    created: datetime
    expires: datetime

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the content."""
        return digest_json(self.model_dump(mode="json"))

    @property
    def sides(self) -> dict[int, str]:
        """Return the signs of statistics that are tested, and what their tests are called: large ones are
        suspicious, of sampled tokens small ones too."""
        return {1: "", -1: " below"} if self.level == "sampled" else {1: ""}

    def check(self, reference: ModelClaim, corpus: str, is_recorded: bool = False) -> None:
        """Raise BitassayError for another reference or other texts, and for a profile that has expired, but
        where it is to judge what was recorded."""
        if not self.reference.is_same_model(reference):
            raise BitassayError(
                f"a profile of another reference ({self.reference.name})", "--calibrate-from an honest server"
            )
        if self.corpus != corpus:
            raise BitassayError(f"a profile of other texts ({self.corpus})", f"--text {self.corpus}")
        if not is_recorded and self.expires < datetime.now(UTC):
            raise BitassayError(f"the profile expired on {self.expires:%Y-%m-%d}", "calibrate again")


def new_profile(
    reference: ModelClaim,
    asking: Asking,
    corpus: str,
    servers: Mapping[str, Sequence[float | None]],
    alpha: float,
) -> AuditProfile:
    """Return the profile of honest servers. servers: statistics by URL, of the same texts in the same order;
    None: an answer without one. Raises BitassayError for too few to refuse anything at `alpha`."""
    if asking.level == "sampled" and len(servers) > 1:
        raise BitassayError("sampled tokens are calibrated on one honest server", "one --calibrate-from")
    scores = [
        max(each for each in of_text if each is not None)
        for of_text in zip(*servers.values(), strict=True)
        if None not in of_text
    ]
    if len(scores) < runs_needed(alpha):
        raise BitassayError(
            f"{len(scores)} honest answers are too few for alpha {alpha:g}, which needs {runs_needed(alpha)}",
            f"--calibration-requests {runs_needed(alpha) + 10} or more, or a larger --alpha",
        )
    created = datetime.now(UTC).replace(microsecond=0)
    return AuditProfile(
        reference=reference,
        level=asking.level,
        form=asking.form,
        k=asking.k,
        positions=asking.positions,
        corpus=corpus,
        servers=tuple(servers),
        scores=tuple(scores),
        created=created,
        expires=created + timedelta(days=EXPIRES_DAYS),
    )


def write_audit_profile(path: Path, profile: AuditProfile) -> None:
    """Write a profile, whole or not at all."""
    write_json(path, profile.model_dump(mode="json"))


def read_audit_profile(path: Path) -> AuditProfile:
    """Read a profile. Raises BitassayError that names the file and its first defect."""
    try:
        return AuditProfile.model_validate(read_json(path))
    except ValidationError as error:
        raise BitassayError(
            f"{path}: not a profile of audits: {first_defect(error)}", "the profile.json of an audit's folder"
        ) from error


def answer_p_value(score: float, profile: AuditProfile) -> float:
    """Return the p-value of one answer, if the server is honest; of sampled tokens, of both sides."""
    found = [p_value(sign * score, [sign * each for each in profile.scores]) for sign in profile.sides]
    return min(len(found) * min(found), 1.0)


def ledger_evidence(lines: Sequence[Line], profile: AuditProfile, alpha: float) -> SequentialEvidence | None:
    """Return what a ledger's scores prove in their order; of sampled tokens, the side that proves more, at
    twice its p-value."""
    sides = []
    for sign in profile.sides:
        signed = [
            line.model_copy(update={"score": None if line.score is None else sign * line.score})
            for line in lines
        ]
        honest = [sign * each for each in profile.scores]
        sides.append(score_evidence(signed, lambda _limit, honest=honest: honest, alpha / len(profile.sides)))
    known = [each for each in sides if each is not None]
    if not known:
        return None
    best = min(known, key=lambda each: each.p_value)
    return replace(best, p_value=min(len(profile.sides) * best.p_value, 1.0), alpha=alpha)


def decide(
    scores: Sequence[float],
    unscored: int,
    profile: AuditProfile | None,
    alpha: float,
    sequence: SequentialEvidence | None = None,
    watched: bool = False,
) -> dict[str, Any]:
    """Return the decision: status, why, alpha, and of each test its p-value and its level. unscored: answers
    without a statistic. watched: by the sequence alone, which may be looked at for ever. An honest server
    gets FAIL with a probability of at most alpha."""
    tests: dict[str, dict[str, float]] = {}

    def made(status: str, why: str) -> dict[str, Any]:
        return {"status": status, "why": why, "alpha": alpha, "tests": tests}

    if profile is None:
        return made("INCONCLUSIVE", "there is no profile of honest servers: nothing says how far is too far")
    if scores and not watched:
        level, n = alpha / 2 if sequence else alpha, len(profile.scores)
        level = level / len(profile.sides) / (2 if len(scores) > 1 else 1)
        for sign, side in profile.sides.items():
            honest = [sign * each for each in profile.scores]
            p_values = [p_value(sign * each, honest) for each in scores]
            tests[f"set{side}"] = {"p_value": pooled_p_value(p_values, n), "level": level}
            if len(scores) > 1:
                tests[f"count{side}"] = {"p_value": fail_count(p_values, n, alpha), "level": level}
    if sequence:
        tests["sequence"] = {"p_value": sequence.p_value, "level": alpha if watched else alpha / 2}
    told = [f"{name} p {test['p_value']:.2g} (level {test['level']:.2g})" for name, test in tests.items()]
    refused = [
        text for text, test in zip(told, tests.values(), strict=True) if test["p_value"] <= test["level"]
    ]
    if refused:
        return made("FAIL", f"{', '.join(refused)}: farther from the reference than honest servers are")
    if not scores or unscored > UNDECIDED * (unscored + len(scores)):
        return made("INCONCLUSIVE", f"{unscored} of {unscored + len(scores)} answers could not be judged")
    if not watched and len(scores) == 1 and len(profile.sides) / (len(profile.scores) + 1) > alpha:
        return made("INCONCLUSIVE", "one answer cannot be refused by so few honest ones")
    return made("PASS", ", ".join(told))

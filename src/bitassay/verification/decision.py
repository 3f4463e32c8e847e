"""The decision about one call: everything that was found, with one false-accusation rate for all of it.

Many traces are many chances to accuse an honest host. Exact checks cost nothing: an honest host never fails
them. Each statistical test gets a share of alpha, and the host is refused where one of them has a p-value of
at most its share, so the probability that an honest host ever is in this call is at most alpha (union bound).
The tests are always the same four, whatever the host sent:

    the set         Mann-Whitney over all traces (`pooled.py`)        3/8
    single fails    how many traces fail alone (`pooled.py`)          1/8
    the sequence    also of earlier calls, with a ledger              3/8
    undecided       requests without a decision (`accounting.py`)     1/8

A single trace without a ledger is decided by its own verdict. With a ledger its p-value stands for set and
single fails, at 1/2.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitassay.verification.pooled import fail_count_p_value, pooled_verdict
from bitassay.verification.sequential import SequentialEvidence
from bitassay.verification.structure import Status
from bitassay.verification.verdict import Verdict

SET, FAILS, SEQUENCE, UNDECIDED = 3 / 8, 1 / 8, 3 / 8, 1 / 8


@dataclass(frozen=True)
class Decision:
    """status and why in one sentence. alpha: of the whole call. tests: p-value under honesty and level of
    each test that took part."""

    status: Status
    why: str
    alpha: float
    tests: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tests = {name: {"p_value": p, "level": level} for name, (p, level) in self.tests.items()}
        return asdict(self) | {"tests": tests}

    def __str__(self) -> str:
        return f"{self.status} because {self.why}"


def decision(
    verdicts: Sequence[Verdict],
    scored: Sequence[Verdict],
    sequence: SequentialEvidence | None,
    undecided: SequentialEvidence | None,
    waiting: Sequence[Verdict],
    alpha: float,
    budget: float,
    unanswered: int = 0,
    with_ledger: bool = False,
) -> Decision:
    """Return the decision about a call.

    verdicts: of all files that count. scored: those of them that statistics use, of different prompts.
    waiting: those that nobody but the verifier left undecided. sequence, undecided: of this call, or of the
    ledger. unanswered: requests without a file.
    """
    tests: dict[str, tuple[float, float]] = {}

    def made(status: Status, why: str) -> Decision:
        return Decision(status, why, alpha, tests)

    if failing := [verdict for verdict in verdicts if verdict.structural]:
        first = failing[0].structural[0].sentence
        return made("FAIL", f"{len(failing)} of {len(verdicts)} fail exact checks: {first}")
    if len(verdicts) == 1 and not unanswered and not with_ledger:
        (verdict,) = verdicts
        if verdict.p_value is not None and verdict.refusal is not None:
            tests["trace"] = (verdict.refusal, alpha)
        return made(verdict.status, "; ".join(reason.sentence for reason in verdict.reasons))
    if len(scored) == 1 and scored[0].p_value is not None:
        tests["trace"] = (scored[0].p_value, (SET + FAILS) * alpha)
    elif scored:
        pooled = pooled_verdict(scored).p_value
        assert pooled is not None
        tests["set"] = (pooled, SET * alpha)
        tests["single fails"] = (fail_count_p_value(scored, scored[0].alpha or alpha), FAILS * alpha)
    if sequence:
        tests["sequence"] = (sequence.p_value, SEQUENCE * alpha)
    if undecided:
        tests["too-many-undecided"] = (undecided.p_value, UNDECIDED * alpha)
    told = {name: f"{name} p {p:.2g} (level {level:.2g})" for name, (p, level) in tests.items()}
    refused = [text for name, text in told.items() if tests[name][0] <= tests[name][1]]
    if refused:
        return made("FAIL", ", ".join(refused))
    without = [verdict for verdict in verdicts if verdict.p_value is None]
    count, every = len(without) + unanswered, len(verdicts) + unanswered
    if waiting or not scored or count > budget * every:
        first = next((verdict.reasons[0].sentence for verdict in [*waiting, *without]), "unanswered")
        return made("INCONCLUSIVE", f"{count} of {every} requests have no decision: {first}")
    return made("PASS", ", ".join(told.values()))

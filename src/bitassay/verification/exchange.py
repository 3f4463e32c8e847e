"""What a verifier gets to judge, and what exact checks say about it before any number is compared.

It is one of three: a whole trace; by receipt, an `Answer` to the verifier's own challenge; or, where the one
in question is itself a verifier, its `Ballot` in a committee's round. `examine` asks the functions that
`bitassay verify` and `bitassay committee` ask, from the bytes of the files on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.verification.committee.rounds import Assignment, Report, judge
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.audit import opening_defects
from bitassay.verification.receipts.challenge import Challenge, opened_positions
from bitassay.verification.receipts.opening import decode_opening, withheld
from bitassay.verification.receipts.receipt import decode
from bitassay.verification.structure import Reason, Request, claim_defects, shape_defects
from bitassay.verification.trace import Header, Trace


@dataclass(frozen=True)
class Answer:
    """receipt, opening: the files that a host sent; None: it sent no opening. asked: the verifier's own
    challenge. signer: the public key that it knows as the host's."""

    receipt: bytes
    asked: Challenge
    opening: bytes | None
    signer: bytes


@dataclass(frozen=True)
class Ballot:
    """One round of a committee, as its coordinator has it after all have revealed. verifier: the one in
    question."""

    round: str
    verifier: str
    assignments: tuple[Assignment, ...]
    commitments: Mapping[str, str]
    revealed: Mapping[str, Report]


Handed = Trace | Answer | Ballot


@dataclass(frozen=True)
class Shown:
    """States of a claimed run at some of its positions, ascending, in a form that can be compared."""

    header: Header
    positions: tuple[int, ...]
    states: Mapping[int, Float[Tensor, "positions hidden"]]


@dataclass(frozen=True)
class Examined:
    """tokens: of the claimed output; 0 where none can be read. defects: what exact checks found. shown: None
    where there is nothing to compare with a prefill."""

    tokens: int
    defects: tuple[Reason, ...]
    shown: Shown | None = None


def examine(handed: Handed, model: PreTrainedModel, request: Request) -> Examined:
    """Exact checks by a verifier that holds `model` and knows what was asked."""
    match handed:
        case Trace():
            if defects := shape_defects(handed, model):
                return Examined(handed.n_tokens, tuple(defects))
            return _examined(Shown(handed.header, handed.header.positions, handed.states), model, request)
        case Answer():
            return _examined_answer(handed, model, request)
        case Ballot():
            judged = judge(handed.round, handed.assignments, handed.commitments, handed.revealed)
            return Examined(0, judged[handed.verifier])


def _examined_answer(answer: Answer, model: PreTrainedModel, request: Request) -> Examined:
    tokens = 0
    try:
        receipt = decode(answer.receipt, Path("receipt"))
        tokens = len(receipt.header.output_ids)
        if answer.opening is None:
            raise withheld("opening")
        opening = decode_opening(answer.opening, receipt, answer.asked, Path("opening"))
    except TraceError as error:
        return Examined(tokens, (Reason(error.code, error.problem),))
    if defects := opening_defects(receipt, answer.asked, opening, model, answer.signer):
        return Examined(tokens, tuple(defects))
    positions = opened_positions(answer.asked, receipt.header)
    return _examined(Shown(receipt.header, positions, opening.states), model, request)


def _examined(shown: Shown, model: PreTrainedModel, request: Request) -> Examined:
    claims = claim_defects(Trace(shown.header, {}), model, request)
    return Examined(len(shown.header.output_ids), tuple(claims), shown)


def codes(defects: Sequence[Reason]) -> tuple[str, ...]:
    return tuple(defect.code for defect in defects)

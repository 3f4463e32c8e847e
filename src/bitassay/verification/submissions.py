"""What a verifier is sent, and what exact checks say of it before any number is compared.

A submission is a whole trace; a response to a challenge of its receipt; or, where the one in question is
itself a verifier, its round in a committee. `check_submission` starts from the bytes of the files, as
`bitassay verify` and `bitassay committee` do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.verification.committee.rounds import Assignment, Report, judge
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.challenge import Challenge, opened_positions
from bitassay.verification.receipts.opening import Opening, check_opening, decode_opening, withheld
from bitassay.verification.receipts.receipt import Receipt, check_signature, decode
from bitassay.verification.structure import (
    Reason,
    Request,
    claim_defects,
    header_defects,
    hidden_size_defects,
    shape_defects,
    unanswered,
)
from bitassay.verification.trace import Header, Trace


@dataclass(frozen=True)
class ReceiptResponse:
    """receipt, opening: the files that a host sent; None: it sent no opening. challenge: the verifier's own.
    signer: the public key that it knows as the host's."""

    receipt: bytes
    challenge: Challenge
    opening: bytes | None
    signer: bytes


@dataclass(frozen=True)
class CommitteeRound:
    """One round of a committee, as its coordinator has it after all have revealed. verifier: the one in
    question."""

    round: str
    verifier: str
    assignments: tuple[Assignment, ...]
    commitments: Mapping[str, str]
    revealed: Mapping[str, Report]


Submission = Trace | ReceiptResponse | CommitteeRound


@dataclass(frozen=True)
class OpenedStates:
    """States of a claimed run by layer, at some of its positions, ascending."""

    header: Header
    positions: tuple[int, ...]
    states: Mapping[int, Float[Tensor, "positions hidden"]]

    @property
    def is_whole(self) -> bool:
        """Return whether they are of all positions, and finite: a model can go on from them."""
        every = len(self.positions) == len(self.header.positions)
        return every and all(bool(values.isfinite().all()) for values in self.states.values())


@dataclass(frozen=True)
class CheckResult:
    """tokens: of the claimed output; 0 where none can be read. defects: what exact checks found. opened: None
    where there is nothing to compare with a prefill. undecided: why statistics cannot decide. answers:
    whether it is of the request and length that were asked for; otherwise it needs no statistics."""

    tokens: int
    defects: tuple[Reason, ...]
    opened: OpenedStates | None = None
    undecided: tuple[Reason, ...] = ()
    answers: bool = True


def check_submission(submission: Submission, model: PreTrainedModel, request: Request) -> CheckResult:
    """Return what exact checks find, for a verifier that holds `model` and knows what was asked."""
    match submission:
        case Trace(header, states):
            if defects := shape_defects(submission, model):
                return CheckResult(submission.n_tokens, tuple(defects))
            return _comparable(OpenedStates(header, header.positions, states), model, request)
        case ReceiptResponse():
            return _check_response(submission, model, request)
        case CommitteeRound(round, verifier, assignments, commitments, revealed):
            return CheckResult(0, judge(round, assignments, commitments, revealed)[verifier])


def check_opened(
    receipt: Receipt,
    challenge: Challenge,
    opening: Opening,
    model: PreTrainedModel,
    request: Request,
    signer: bytes | None,
) -> CheckResult:
    """Return what exact checks find in a receipt and what was opened of it. signer: the host's public key;
    None: not known, so that the receipt may be anybody's."""
    header = receipt.header
    tokens = len(header.output_ids)
    try:
        check_signer(receipt, signer)
        check_opening(opening, receipt, challenge)
    except TraceError as error:
        return CheckResult(tokens, (Reason(error.code, error.problem),))
    if defects := header_defects(header, model) + hidden_size_defects(opening.states, model):
        return CheckResult(tokens, tuple(defects))
    opened = OpenedStates(header, opened_positions(challenge, header), opening.states)
    return _comparable(opened, model, request, unknown_signer(receipt, signer))


def check_signer(receipt: Receipt, signer: bytes | None) -> None:
    """Raise TraceError unless the receipt's key has signed it and is that of `signer`, where one is known."""
    check_signature(receipt)
    if signer is not None and signer != receipt.key:
        raise TraceError("other-signer", f"signed by {receipt.key.hex()}, not {signer.hex()}")


def unknown_signer(receipt: Receipt, signer: bytes | None) -> tuple[Reason, ...]:
    """Return why nothing signed can be decided where nobody knows whose key it is."""
    sentence = f"signed by {receipt.key.hex()}; nobody has said whose key that is"
    return () if signer is not None else (Reason("unknown-signer", sentence),)


def _check_response(response: ReceiptResponse, model: PreTrainedModel, request: Request) -> CheckResult:
    tokens = 0
    try:
        receipt = decode(response.receipt, Path("receipt"))
        tokens = len(receipt.header.output_ids)
        if response.opening is None:
            raise withheld("opening")
        opening = decode_opening(response.opening, receipt, response.challenge, Path("opening"))
    except TraceError as error:
        return CheckResult(tokens, (Reason(error.code, error.problem),))
    return check_opened(receipt, response.challenge, opening, model, request, response.signer)


def _comparable(
    opened: OpenedStates, model: PreTrainedModel, request: Request, undecided: tuple[Reason, ...] = ()
) -> CheckResult:
    claims = tuple(claim_defects(opened.header, model, request))
    answers = not unanswered(opened.header, model, request)
    return CheckResult(len(opened.header.output_ids), claims, opened, undecided, answers)

"""A committee's round as files, none of which is trusted.

    file                      who writes it       who reads it
    secret.json               coordinator         coordinator alone: assignments with their canaries
    tasks/NAME.json           coordinator         verifier NAME: its items, and who else takes part
    report.json               verifier            itself alone, until it reveals: answers and salt
    commitments/NAME.json     verifier NAME       everybody, before anybody reveals
    reveals/NAME.json         verifier NAME       everybody: the report, and which commitments it had seen

A reveal names the digest of all commitments that its verifier had seen, and is made only where there is one
of everybody, but for those whom the coordinator has left out for want of one. So a commitment that is
replaced after the first reveal is noticed: the reveal is then of other commitments than the coordinator has.
What one verifier sends cannot stop the round: a file that cannot be read counts against its name alone.

What it leaves out: who may write NAME.json. The coordinator collects the files by a way that says who sent
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bitassay.errors import BitassayError
from bitassay.record.files import decode_text
from bitassay.record.hashing import digest_json
from bitassay.record.schema import StrictFields
from bitassay.verification.committee.rounds import (
    ITEMS,
    Assignment,
    Expected,
    Item,
    Items,
    Name,
    Report,
    judge,
    report_commitment,
)
from bitassay.verification.container import TraceError, first_defect, read_regular, strict_json
from bitassay.verification.structure import Reason, Status
from bitassay.verification.trace import Digest, Version

FILE_BYTES = 2**26
VERIFIERS = 1000
Round = Annotated[str, Field(min_length=1, max_length=128)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, max_length=VERIFIERS, strict=False)]


_ITEMS = TypeAdapter(Items)


class _File(StrictFields):
    committee: Version = 1
    round: Round


class Task(_File):
    """What one verifier is given. verifiers: all that take part."""

    verifier: Name
    verifiers: Names
    items: Items


class Commitment(_File):
    """The digest of a verifier's report, handed in before any report is revealed."""

    verifier: Name
    commitment: Digest


class Revealed(_File):
    """seen: digest of the commitments that its verifier had seen."""

    seen: Digest
    report: Report


class Secret(_File):
    """What the coordinator keeps to itself until all have revealed."""

    assignments: Annotated[tuple[Assignment, ...], Field(min_length=1, max_length=VERIFIERS, strict=False)]

    @property
    def verifiers(self) -> tuple[str, ...]:
        """Return the names of all that take part."""
        return tuple(assignment.verifier for assignment in self.assignments)


class Canaries(BaseModel):
    """By verifier, items of its own with the answer that is known."""

    model_config = ConfigDict(strict=True)

    canaries: Annotated[dict[Name, dict[Item, Expected]], Field(min_length=1, max_length=VERIFIERS)]


class Answers(BaseModel):
    """A verifier's status for each of its items."""

    model_config = ConfigDict(strict=True)

    answers: Annotated[dict[Item, Status], Field(max_length=ITEMS)]


Kind = TypeVar("Kind", bound=BaseModel)


def _read_json(path: Path) -> Any:
    return strict_json(decode_text(read_regular(path, FILE_BYTES), path), path)


def read(path: Path, kind: type[Kind], remedy: str, field: str | None = None) -> Kind:
    """Return the file at `path`, of which `kind` says what must be in it (its `field`, if one is named).
    Raises BitassayError that names the file."""
    try:
        content = _read_json(path)
        return kind.model_validate(content if field is None else {field: content})
    except TraceError as error:
        raise BitassayError(error.problem, remedy) from error
    except ValidationError as error:
        raise BitassayError(f"{path}: {first_defect(error)}", remedy) from error


def read_items(path: Path) -> list[str]:
    """Return items from a text file, one a line; empty lines do not count."""
    try:
        lines = decode_text(read_regular(path, FILE_BYTES), path).split("\n")
        items = [line.strip() for line in lines if line.strip()]
        if not items:
            raise BitassayError(f"{path}: no items", "a text file with one item a line")
        _ITEMS.validate_python(tuple(items))
    except TraceError as error:
        raise BitassayError(error.problem, "a text file with one item a line") from error
    except ValidationError as error:
        raise BitassayError(f"{path}: not a list of items", "a text file with one item a line") from error
    return items


def read_canaries(path: Path) -> dict[str, dict[str, Expected]]:
    """Return the canaries of each verifier with their answers."""
    return read(path, Canaries, '{"VERIFIER": {"ITEM": "FAIL", …}, …}', "canaries").canaries


def read_answers(path: Path) -> dict[str, Status]:
    """Return answers by item; the file holds these, or what `bitassay verify --format json` printed about
    traces whose paths are the items."""
    remedy = '{"ITEM": "PASS", …}, or the output of bitassay verify --format json'
    try:
        content = _read_json(path)
    except TraceError as error:
        raise BitassayError(error.problem, remedy) from error
    match content:
        case {"rows": list(rows), "pooled": _} if all(
            isinstance(row, dict) and isinstance(row.get("trace"), str) for row in rows
        ):
            content = {row["trace"]: row.get("status") for row in rows}
    try:
        return Answers.model_validate({"answers": content}).answers
    except ValidationError as error:
        raise BitassayError(f"{path}: {first_defect(error)}", remedy) from error


@dataclass(frozen=True)
class Board:
    """The commitments that there are, by verifier, and against whom a file counts that cannot be read."""

    commitments: Mapping[str, str]
    unreadable: Mapping[str, Reason]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of all commitments."""
        return digest_json(dict(self.commitments))


def read_board(folder: Path, round: str, verifiers: Sequence[str]) -> Board:
    """Return the commitments of a round in `folder`, one file a verifier."""
    commitments, unreadable = {}, {}
    for name in verifiers:
        path = folder / f"{name}.json"
        if path.exists():
            try:
                handed_in = read(path, Commitment, "")
                _check_named(path, name, round, handed_in.verifier, handed_in.round)
                commitments[name] = handed_in.commitment
            except BitassayError as error:
                unreadable[name] = Reason("unreadable-commitment", error.problem)
    return Board(commitments, unreadable)


def reveal(mine: Report, task: Task, board: Board, without: Sequence[str] = ()) -> Revealed:
    """Return what a verifier publishes once there is a commitment of everybody but those `without`. Raises
    BitassayError before that, and where the report is not what it committed to."""
    missing = [name for name in task.verifiers if name not in board.commitments and name not in without]
    if missing:
        raise BitassayError(
            f"no commitment of {missing[0]} ({len(missing)} missing): what you reveal now could be copied",
            "wait, and run the same command again; --without NAME if the coordinator has left it out",
        )
    committed = board.commitments.get(task.verifier)
    if mine.verifier != task.verifier or report_commitment(task.round, mine) != committed:
        raise BitassayError(
            f"the report is not the one that {task.verifier} committed to in this round",
            "the --report that bitassay committee commit wrote, with the same task",
        )
    return Revealed(round=task.round, seen=board.digest, report=mine)


def judge_files(
    secret: Secret, commitments: Path, reveals: Path, *, alpha: float = 0.05
) -> tuple[dict[str, tuple[Reason, ...]], dict[str, Report]]:
    """Return why each verifier's report is not to be used, and the reports, from the files that came."""
    board = read_board(commitments, secret.round, secret.verifiers)
    reports: dict[str, Report] = {}
    wrong = dict(board.unreadable)
    for name in secret.verifiers:
        path = reveals / f"{name}.json"
        if not path.exists() or name in wrong:
            continue
        try:
            revealed = read(path, Revealed, "")
            _check_named(path, name, secret.round, revealed.report.verifier, revealed.round)
        except BitassayError as error:
            wrong[name] = Reason("unreadable-report", error.problem)
            continue
        reports[name] = revealed.report
        if revealed.seen != board.digest:
            sentence = "it was revealed when the commitments of all were not yet those that are here"
            wrong[name] = Reason("other-commitments", sentence)
    judged = judge(secret.round, secret.assignments, board.commitments, reports, alpha=alpha)
    return {name: (wrong[name],) if name in wrong else reasons for name, reasons in judged.items()}, reports


def _check_named(path: Path, name: str, round: str, found_name: str, found_round: str) -> None:
    if (found_name, found_round) != (name, round):
        raise BitassayError(
            f"{path}: of {found_name!r:.70} in round {found_round!r:.70}, not {name!r} in {round!r}"
        )

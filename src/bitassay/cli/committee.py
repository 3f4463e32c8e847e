"""`bitassay committee`: verifiers that do not trust each other, through files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import Names
from bitassay.report.tables import Column

if TYPE_CHECKING:
    from bitassay.verification.committee.rounds import Report
    from bitassay.verification.structure import Reason

committee = App(
    name="committee",
    help="Verifiers that commit before they reveal; planted items catch the lazy. In this order: "
    "assign, commit, reveal, judge.",
)


@committee.command
def assign(
    *,
    items: Path,
    plants: Path,
    out: Path,
    each: int = 2,
    round: str | None = None,
    format: Format = "table",
) -> int:
    """Deal items to verifiers, with planted ones among them (the coordinator).

    Writes tasks/VERIFIER.json, to be sent to each, and secret.json, which only you may see before all have
    revealed.

    Args:
        items: A text file with one item a line: names of traces, receipts or whatever is to be judged.
        plants: A JSON file: for each verifier, items of its own whose answer you know. Four failures and
            three honest ones catch who answers without looking.
        out: The folder of the round, new or empty.
        each: How many verifiers get an item.
        round: The name of the round, never used before (default: a fresh random one).
        format: What to print on stdout.
    """
    import secrets

    from bitassay.record.files import atomic_folder, write_json
    from bitassay.verification.committee.files import Secret, Task, read_items, read_plants
    from bitassay.verification.committee.rounds import assign as deal

    word = secrets.token_hex(16) if round is None else round
    given = deal(read_items(items), read_plants(plants), each=each, seed=secrets.token_bytes(32))
    verifiers = tuple(one.verifier for one in given)
    with _checked("round"), atomic_folder(out) as folder:
        with _private():
            write_json(folder / "secret.json", Secret.of(word, given).model_dump(mode="json"))
        for one in given:
            task = Task(round=word, verifier=one.verifier, verifiers=verifiers, items=one.items)
            write_json(folder / "tasks" / f"{one.verifier}.json", task.model_dump(mode="json"))
    rows = [
        {
            "verifier": one.verifier,
            "task": str(out / "tasks" / f"{one.verifier}.json"),
            "items": len(one.items),
            "planted": len(one.planted),
        }
        for one in given
    ]
    columns = [
        Column("verifier", "verifier", align="left"),
        Column("items", "items"),
        Column("planted", "planted"),
        Column("task", "task", align="left"),
    ]
    emit(rows, columns, format, whole={"round": word, "secret": str(out / "secret.json"), "rows": rows})
    return 0


@committee.command
def commit(task: Path, /, *, answers: Path, report: Path, out: Path, format: Format = "table") -> int:
    """Commit to the answers to TASK (a verifier).

    Send the commitment, and keep the report to yourself until all have committed.

    Args:
        task: What `bitassay committee assign` wrote for you.
        answers: A JSON file: PASS, FAIL or INCONCLUSIVE for each item. Or what `bitassay verify --format
            json` printed, where the items are the paths of the traces.
        report: Where to keep the answers with a fresh salt; readable to you alone.
        out: The commitment, named VERIFIER.json: everybody may see it.
        format: What to print on stdout.
    """
    from bitassay.errors import BitassayError
    from bitassay.record.files import write_json
    from bitassay.verification.committee.files import Commitment, Task, read, read_answers
    from bitassay.verification.committee.rounds import report as make_report
    from bitassay.verification.committee.rounds import report_commitment

    mine = read(task, Task, "the file that bitassay committee assign wrote")
    said = read_answers(answers)
    if missing := [item for item in mine.items if item not in said]:
        raise BitassayError(
            f"{answers}: no answer to {missing[0]!r:.80} ({len(missing)} of {len(mine.items)} are missing)",
            "judge every item of the task",
        )
    made = make_report(mine.verifier, {item: said[item] for item in mine.items})
    digest = report_commitment(mine.round, made)
    with _private():
        write_json(report, made.model_dump())
    write_json(out, Commitment(round=mine.round, verifier=mine.verifier, commitment=digest).model_dump())
    row = {"verifier": mine.verifier, "answers": len(made.answers), "commitment": digest, "file": str(out)}
    columns = [
        Column("verifier", "verifier", align="left"),
        Column("answers", "answers"),
        Column("commitment", "commitment", align="left"),
        Column("file", "file", align="left"),
    ]
    emit([row], columns, format)
    return 0


@committee.command
def reveal(
    report: Path,
    /,
    *,
    task: Path,
    commitments: Path,
    out: Path,
    without: Names | None = None,
    format: Format = "table",
) -> int:
    """Reveal REPORT, once everybody has committed (a verifier).

    Args:
        report: What `bitassay committee commit` kept.
        task: The task that it answers.
        commitments: A folder with VERIFIER.json of all that take part.
        out: What everybody may see now, named VERIFIER.json.
        without: Verifiers that the coordinator has left out because they did not commit.
        format: What to print on stdout.
    """
    from bitassay.record.files import write_json
    from bitassay.verification.committee.files import Task, read, read_board
    from bitassay.verification.committee.files import reveal as revealed
    from bitassay.verification.committee.rounds import Report

    mine = read(report, Report, "the --report that bitassay committee commit wrote")
    given = read(task, Task, "the file that bitassay committee assign wrote")
    shown = revealed(mine, given, read_board(commitments, given.round, given.verifiers), without or ())
    write_json(out, shown.model_dump(mode="json"))
    row = {"verifier": mine.verifier, "answers": len(mine.answers), "seen": shown.seen, "file": str(out)}
    columns = [
        Column("verifier", "verifier", align="left"),
        Column("answers", "answers"),
        Column("file", "file", align="left"),
    ]
    emit([row], columns, format)
    return 0


@committee.command
def judge(
    secret: Path,
    /,
    *,
    commitments: Path,
    reveals: Path,
    alpha: float = 0.05,
    quorum: int = 2,
    format: Format = "table",
) -> int:
    """Say whose reports count, why others do not, and what the rest found (the coordinator).

    Exit status 0 where every item passes.

    Args:
        secret: What `bitassay committee assign` kept.
        commitments: The folder of commitments, as it was before anybody revealed.
        reveals: The folder of what was revealed.
        alpha: How often an honest verifier refuses an honest run.
        quorum: Verifiers that count without whom an item is INCONCLUSIVE.
        format: What to print on stdout; json has verifiers and items.
    """
    from bitassay.errors import BitassayError
    from bitassay.verification.committee.files import Secret, judge_files, read

    if not 0 < alpha < 1 or quorum < 1:
        raise BitassayError(f"alpha {alpha:g}, quorum {quorum}", "alpha between 0 and 1, a quorum from 1 on")
    for folder in (commitments, reveals):
        if not folder.is_dir():
            raise BitassayError(f"{folder}: not a folder", "a folder with VERIFIER.json of each")
    known = read(secret, Secret, "the secret.json that bitassay committee assign wrote")
    judged, reports = judge_files(known, commitments, reveals, alpha=alpha)
    planted = {item for one in known.assignments for item in one.planted}
    asked = dict.fromkeys(item for one in known.assignments for item in one.items if item not in planted)
    verifiers = [_verifier_row(name, reasons) for name, reasons in judged.items()]
    items = [_item_row(item, reports, judged, quorum) for item in asked]
    if format in ("table", "md"):
        emit(verifiers, _VERIFIERS, format)
        print()
    whole = {"round": known.round, "verifiers": verifiers, "rows": items}
    emit(items, _ITEMS, format, whole=whole)
    return 0 if all(row["status"] == "PASS" for row in items) else 1


_VERIFIERS = [
    Column("verifier", "verifier", align="left"),
    Column("counts", "counts", lambda counts: "yes" if counts else "no", align="left"),
    Column("why", "why not", align="left"),
]
_ITEMS = [
    Column("item", "item", align="left"),
    Column("status", "verdict", align="left"),
    Column("votes", "votes that count", lambda votes: ", ".join(f"{n} {s}" for s, n in votes.items())),
]


def _verifier_row(name: str, reasons: "tuple[Reason, ...]") -> dict[str, Any]:
    return {
        "verifier": name,
        "counts": not reasons,
        "codes": [reason.code for reason in reasons],
        "why": "; ".join(reason.sentence for reason in reasons) or None,
    }


def _item_row(
    item: str, reports: "dict[str, Report]", judged: "dict[str, tuple[Reason, ...]]", quorum: int
) -> dict[str, Any]:
    from collections import Counter

    from bitassay.verification.committee.rounds import committee_status

    sound = [reports[name].answers for name, reasons in judged.items() if not reasons]
    votes = Counter(answers[item] for answers in sound if item in answers)
    status = committee_status(item, reports, judged, quorum)
    return {"item": item, "status": status, "votes": dict(sorted(votes.items()))}


@contextmanager
def _private() -> Iterator[None]:
    """Files that are written within are readable to their owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _checked(option: str) -> Iterator[None]:
    """An option that the files cannot hold is the user's mistake."""
    from pydantic import ValidationError

    from bitassay.errors import BitassayError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise BitassayError(f"--{option}: {first['msg']}", "a word of up to 128 letters") from error

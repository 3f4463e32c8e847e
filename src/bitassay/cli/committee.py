"""`bitassay committee`: verifiers that do not trust each other, through files."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from bitassay.cli.options import Alpha, Count, Names, Output
from bitassay.errors import BitassayError
from bitassay.report.tables import Column

committee = App(
    name="committee",
    help="Let several verifiers judge. They commit before they reveal, and canaries (items of known answer) "
    "expose those that do not look. In this order: assign, commit, reveal, judge.",
)

TASK = "the file that bitassay committee assign wrote"


def _fits_a_file(_: Any, name: str | None) -> None:
    if name is not None and not 1 <= len(name) <= 128:
        raise ValueError("A round has a name of 1 to 128 letters.")


@committee.command
def assign(
    *,
    items: Path,
    plants: Path,
    out: Path,
    each: int = 2,
    round: Annotated[str | None, Parameter(validator=_fits_a_file)] = None,
    output: Output = Output(),
) -> int:
    """Deal items to verifiers, with canaries among them (the coordinator).

    Writes tasks/VERIFIER.json, to be sent to each verifier, and secret.json, which only the coordinator may
    see before all have revealed.

    Args:
        items: A text file with one item on each line: names of traces, receipts or anything else to be
            judged.
        plants: A JSON file with canaries: for each verifier as many items whose answer you know. Four
            failures and three honest items expose a verifier that answers without looking. Each is dealt to
            other verifiers too, as any item is.
        out: The folder of the round. It must be new or empty.
        each: How many verifiers judge each item.
        round: The name of the round, never used before (default: a fresh random one).
    """
    import secrets

    from bitassay.record.files import atomic_folder, write_json
    from bitassay.verification.committee.files import Secret, Task, read_canaries, read_items
    from bitassay.verification.committee.rounds import assign as deal

    name = secrets.token_hex(16) if round is None else round
    assignments = deal(read_items(items), read_canaries(plants), each=each, seed=secrets.token_bytes(32))
    verifiers = tuple(assignment.verifier for assignment in assignments)
    rows = []
    with atomic_folder(out) as folder:
        with _private():
            write_json(
                folder / "secret.json",
                Secret(round=name, assignments=tuple(assignments)).model_dump(mode="json"),
            )
        for assignment in assignments:
            verifier, count = assignment.verifier, len(assignment.items)
            task = Task(round=name, verifier=verifier, verifiers=verifiers, items=assignment.items)
            file = Path("tasks", f"{verifier}.json")
            write_json(folder / file, task.model_dump(mode="json"))
            planted = len(assignment.planted)
            rows.append({"verifier": verifier, "task": str(out / file), "items": count, "planted": planted})
    columns = ["verifier", "items", Column("planted", "canaries"), "task"]
    output.emit((rows, columns), json={"round": name, "secret": str(out / "secret.json"), "rows": rows})
    return 0


@committee.command
def commit(task: Path, /, *, answers: Path, report: Path, out: Path, output: Output = Output()) -> int:
    """Commit to the answers to TASK (a verifier).

    Send the commitment, and keep the report to yourself until all have committed.

    Args:
        task: The task that `bitassay committee assign` wrote for you.
        answers: A JSON file: PASS, FAIL or INCONCLUSIVE for each item. Or the output of `bitassay verify
            --format json`, where the items are the paths of the traces.
        report: Where to keep the answers with a fresh salt, readable to you alone.
        out: The commitment, named VERIFIER.json. Everybody may see it.
    """
    from bitassay.record.files import write_json
    from bitassay.verification.committee.files import Commitment, Task, read, read_answers
    from bitassay.verification.committee.rounds import report as make_report
    from bitassay.verification.committee.rounds import report_commitment

    assigned, answered = read(task, Task, TASK), read_answers(answers)
    if missing := [item for item in assigned.items if item not in answered]:
        missed = f"({len(missing)} of {len(assigned.items)} are missing)"
        raise BitassayError(
            f"{answers}: no answer to {missing[0]!r:.80} {missed}", "judge every item of the task"
        )
    sealed = make_report(assigned.verifier, {item: answered[item] for item in assigned.items})
    verifier, digest = assigned.verifier, report_commitment(assigned.round, sealed)
    with _private():
        write_json(report, sealed.model_dump())
    write_json(out, Commitment(round=assigned.round, verifier=verifier, commitment=digest).model_dump())
    row = {"verifier": verifier, "answers": len(sealed.answers), "commitment": digest, "file": str(out)}
    output.emit(([row], list(row)))
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
    output: Output = Output(),
) -> int:
    """Reveal REPORT, once everybody has committed (a verifier).

    Args:
        report: The report that `bitassay committee commit` kept.
        task: The task that it answers.
        commitments: A folder with VERIFIER.json of every verifier.
        out: The revealed report, named VERIFIER.json. Everybody may see it now.
        without: Verifiers that the coordinator has excluded because they did not commit.
    """
    from bitassay.record.files import write_json
    from bitassay.verification.committee.files import Task, read, read_board
    from bitassay.verification.committee.files import reveal as revealed
    from bitassay.verification.committee.rounds import Report

    sealed = read(report, Report, "the --report that bitassay committee commit wrote")
    assigned = read(task, Task, TASK)
    board = read_board(commitments, assigned.round, assigned.verifiers)
    shown = revealed(sealed, assigned, board, without or ())
    write_json(out, shown.model_dump(mode="json"))
    row = {"verifier": sealed.verifier, "answers": len(sealed.answers), "seen": shown.seen, "file": str(out)}
    output.emit(([row], ["verifier", "answers", "file"]))
    return 0


@committee.command
def judge(
    secret: Path,
    /,
    *,
    commitments: Path,
    reveals: Path,
    alpha: Alpha = 0.05,
    quorum: Count = 2,
    output: Output = Output(),
) -> int:
    """Decide whose reports count, say why the others do not, and give the verdicts (the coordinator).

    Exit status 0 where every item passes.

    Args:
        secret: The secret.json that `bitassay committee assign` kept.
        commitments: The folder of commitments, as it was before anybody revealed.
        reveals: The folder of revealed reports.
        quorum: An item is INCONCLUSIVE where fewer verifiers than this count.
    """
    from bitassay.verification.committee.files import Secret, judge_files, read
    from bitassay.verification.committee.rounds import committee_status

    for folder in (commitments, reveals):
        if not folder.is_dir():
            raise BitassayError(f"{folder}: not a folder", "a folder with VERIFIER.json of each")
    opened = read(secret, Secret, "the secret.json that bitassay committee assign wrote")
    reasons, reports = judge_files(opened, commitments, reveals, alpha=alpha)
    verifiers = [
        {
            "verifier": name,
            "counts": not against,
            "codes": [reason.code for reason in against],
            "why": "; ".join(reason.sentence for reason in against) or None,
        }
        for name, against in reasons.items()
    ]
    planted = {item for assignment in opened.assignments for item in assignment.planted}
    dealt = dict.fromkeys(item for assignment in opened.assignments for item in assignment.items)
    sound = [reports[name].answers for name, against in reasons.items() if not against]
    items: list[dict[str, Any]] = []
    for item in [item for item in dealt if item not in planted]:
        votes = Counter(answers[item] for answers in sound if item in answers)
        status = committee_status(item, reports, reasons, quorum)
        items.append({"item": item, "status": status, "votes": dict(sorted(votes.items()))})
    judged = (items, ["item", Column("status", "verdict", align="left"), _VOTES])
    result = {"round": opened.round, "verifiers": verifiers, "rows": items}
    why = Column("why", "why not", align="left")
    output.emit((verifiers, ["verifier", "counts", why]), judged, csv=judged, json=result)
    return 0 if all(row["status"] == "PASS" for row in items) else 1


_VOTES = Column(
    "votes",
    "votes that count",
    lambda votes: ", ".join(f"{count} {status}" for status, count in votes.items()),
)


@contextmanager
def _private() -> Iterator[None]:
    """Make files that are written within readable to their owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)

"""Audit an endpoint again and again, on a schedule, with one promise over all time.

    OUT/plan.json            what is watched
    OUT/audit-00001/         an audit, as `audit` writes it; the first one calibrates
    OUT/ledger               the scores of all of them, in their order
    OUT/run.json             the audits so far

Each audit asks texts of its own. What is decided is decided by the ledger alone, with all of alpha: its test
may be looked at for ever (`verification/sequential.py`), so the probability that an honest server is ever
refused is at most alpha, however long it is watched. An alarm stands: the watch ends there. A server that
cannot be reached when its time has come is asked again the next time; that is said, and proves nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bitassay.audit.client import AGAIN, AnswerError, Target
from bitassay.audit.judge import AuditProfile, Reference, read_audit_profile
from bitassay.audit.run import audit, planned
from bitassay.audit.session import Options
from bitassay.audit.suspects import NOBODY, Suspect
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import read_run, write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan
from bitassay.verification.trace import ModelClaim

PASSING = {"unreachable", "timeout", "broken", *(f"status-{status}" for status in AGAIN)}
NEXT = 10.0  # seconds between looks at the clock: it may have been set, or the machine have slept
Told = Callable[[str], None]


def watch(
    target: Target,
    reference: Reference,
    options: Options,
    interval_seconds: float,
    *,
    times: int | None = None,
    honest: Sequence[Target] = (),
    profile: AuditProfile | None = None,
    suspects: Mapping[str, Suspect] = NOBODY,
    progress: Progress = silent,
    tell: Told = lambda _: None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[str, Any], Path]:
    """Audit every `interval_seconds`, until the ledger refuses the server or after `times` audits (None: for
    ever). Return the run of all audits and its folder; the same call goes on. tell: is called with a sentence
    after each. Raises BitassayError without a profile or honest servers, and as `audit` does."""
    if profile is None and not honest:
        raise BitassayError(
            "a watch needs to know what honest servers look like", "--calibrate-from URL, or --profile"
        )
    claim = ModelClaim.of(identity(reference.exact))
    work = planned(target, claim, options, honest, profile) | {"seed": options.seed}
    folder = open_run_folder("watch", run_plan("watch", work), options.out)
    ledger = options.ledger or folder.path / "ledger"
    first = folder.path / "audit-00001" / "profile.json"
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    run: dict[str, Any] = {}
    while times is None or len(rows) < times:
        number = len(rows) + 1
        path = folder.path / f"audit-{number:05d}"
        is_new = not (path / "run.json").is_file()
        if is_new:
            _wait(rows, interval_seconds, clock, sleep, is_begun=path.exists())
            known = profile or (None if number == 1 else read_audit_profile(first))
            seed = None if options.seed is None else options.seed + number
            now = replace(options, watched=True, ledger=ledger, out=path, seed=seed)
            servers = () if known else honest
            try:
                audit(
                    target,
                    reference,
                    now,
                    honest=servers,
                    profile=known,
                    suspects=suspects,
                    progress=progress,
                )
            except AnswerError as error:
                if error.code not in PASSING:
                    raise
                tell(f"audit {number}: {error.problem}; it is tried again in {interval_seconds:g} s")
                sleep(interval_seconds)
                continue
        run = read_run(path)
        rows.append(_row(number, run))
        if is_new:
            summary = _written(folder, rows, run, interval_seconds, reference)
            tell(f"audit {number}: {run['decision']['status']}: {run['decision']['why']}")
        if rows[-1]["status"] == "FAIL":
            break
    return summary or _written(folder, rows, run, interval_seconds, reference), folder.path


def _wait(
    rows: Sequence[Mapping[str, Any]],
    interval_seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    is_begun: bool,
) -> None:
    """Wait until an interval after the last audit; not for one that was interrupted."""
    if not rows or is_begun:
        return
    due = datetime.fromisoformat(rows[-1]["created"]).timestamp() + interval_seconds
    while (left := due - clock()) > 0:
        sleep(min(left, NEXT))


def _row(number: int, run: Mapping[str, Any]) -> dict[str, Any]:
    sequence = run["sequence"] or {}
    scored = [row["score"] for row in run["rows"] if row["score"] is not None]
    return {
        "audit": number,
        "created": run["created"],
        "answers": len(run["rows"]),
        "judged": len(scored),
        "score": sum(scored) / len(scored) if scored else None,
        "requests": sequence.get("n_requests", 0),
        "p_value": sequence.get("p_value", 1.0),
        "status": run["decision"]["status"],
    }


def _written(
    folder: RunFolder,
    rows: list[dict[str, Any]],
    last: Mapping[str, Any],
    interval_seconds: float,
    reference: Reference,
) -> dict[str, Any]:
    return write_run(
        folder,
        model=last["model"],
        settings={**last["settings"], "interval_seconds": interval_seconds},
        environment=environment(reference.exact.device),
        rows=rows,
        decision=last["decision"],
    )

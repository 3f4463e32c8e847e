"""Audit an endpoint: probe it, ask, judge, and say what follows (`session.py` asks and measures).

The seed of the texts is drawn when a folder is new and kept in its plan, so that the same command goes on.
profile.json in the folder is that of the honest servers, where they were asked.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitassay.audit.asking import Asking
from bitassay.audit.client import Target
from bitassay.audit.judge import (
    AuditProfile,
    Reference,
    decide,
    ledger_evidence,
    new_profile,
    write_audit_profile,
)
from bitassay.audit.probe import WORDS
from bitassay.audit.session import PROMPT_TOKENS, Options, Session
from bitassay.audit.suspects import NOBODY, Suspect, check_suspects, compare
from bitassay.data.corpora import pinned
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.models.positions import context_length
from bitassay.record.environment import environment
from bitassay.record.files import read_json
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, default_folder, run_plan
from bitassay.verification.ledger import Binding, Item, read_ledger, update_ledger
from bitassay.verification.trace import ModelClaim

NOT_PLANNED = ("out", "ledger", "concurrency", "seed")  # options that do not change what is asked and judged


def audit(
    target: Target,
    reference: Reference,
    options: Options,
    *,
    honest: Sequence[Target] = (),
    profile: AuditProfile | None = None,
    suspects: Mapping[str, Suspect] = NOBODY,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Return the run of an audit and its folder. honest: servers that are known to be, to calibrate on.
    suspects: models that may answer instead, by name. Raises BitassayError where a server cannot be asked, or
    nothing can be judged."""
    claim = ModelClaim.of(identity(reference.exact))
    if profile is not None:
        profile.check(claim, pinned(options.corpus))
    check_first(reference, options, honest, profile)
    folder = _folder(planned(target, claim, options, honest, profile), options)
    session = Session(reference, options, folder, progress)
    return conclude(session, target, honest, profile, suspects), folder.path


def conclude(
    session: Session,
    target: Target,
    honest: Sequence[Target],
    profile: AuditProfile | None,
    suspects: Mapping[str, Suspect] = NOBODY,
) -> dict[str, Any]:
    """Ask what is not answered yet, judge, and write run.json; return it."""
    options, folder, reference = session.options, session.folder, session.reference
    claim, corpus = ModelClaim.of(identity(reference.exact)), folder.plan["corpus"]
    asking = session.probed(0, target, profile)
    check_suspects(asking, suspects)
    scores: dict[str, list[float | None]] = {}
    for index, server in enumerate(honest, 1):
        theirs = session.probed(index, server, None, asking)
        scores[server.endpoint.url] = session.scores(index, server, theirs, options.calibration_requests)
    if honest:
        profile = new_profile(claim, asking, corpus, scores, options.alpha)
    if profile is not None:
        write_audit_profile(folder.path / "profile.json", profile)
    measured = session.scores(0, target, asking, options.requests)
    rows = session.rows(asking, profile)
    lines = _lines(session, asking, measured)
    sequence = None
    if options.ledger is not None and profile is not None:
        kept = update_ledger(options.ledger, lines, Binding(profile=profile.digest))
        level = options.alpha if options.watched else options.alpha / 2
        sequence = ledger_evidence(kept, profile, level)
    judged = [each for each in measured if each is not None]
    undecided = len(measured) - len(judged)
    decision = decide(judged, undecided, profile, options.alpha, sequence, options.watched)
    return write_run(
        folder,
        model={"name": claim.name, "origin": target.endpoint.url, "asked_for": target.model},
        settings={
            **{key: value for key, value in asdict(options).items() if key not in NOT_PLANNED},
            "concurrency": options.concurrency,
            "corpus": corpus,
            "evidence": WORDS[asking.level],
            "asked_by": asdict(asking),
            "with_ledger": options.ledger is not None,
        },
        environment=environment(reference.exact.device),
        rows=rows,
        probes=session.probe_rows(),
        suspects=compare(session, asking, suspects),
        decision=decision,
        calibration=None if profile is None else _described(profile),
        sequence=None if sequence is None else sequence.to_dict(),
        receipts=session.receipts(),
    )


def check_first(
    reference: Reference, options: Options, honest: Sequence[Target], profile: AuditProfile | None
) -> None:
    """Raise BitassayError for what would fail only after everything was asked: texts that the reference
    cannot read, a ledger of another profile."""
    limit, longest = context_length(reference.exact), options.tokens + PROMPT_TOKENS
    if limit is not None and longest > limit:
        raise BitassayError(
            f"{longest} tokens do not fit the reference's {limit} positions", "fewer --tokens"
        )
    if options.level == "sampled" and len(honest) > 1:
        raise BitassayError("sampled tokens are calibrated on one honest server", "one --calibrate-from")
    if options.ledger is None:
        return
    bound, _ = read_ledger(options.ledger, None)
    if profile is None and not honest:
        raise BitassayError("a ledger needs a profile", "--profile profile.json of an earlier audit")
    if bound is not None and (profile is None or bound.profile != profile.digest):
        raise BitassayError(
            f"{options.ledger}: a ledger of another profile ({bound.profile[:12]})",
            "--profile the one that it was begun with, or begin a new --ledger FILE",
        )


def planned(
    target: Target,
    claim: ModelClaim,
    options: Options,
    honest: Sequence[Target],
    profile: AuditProfile | None,
) -> dict[str, Any]:
    """Return what a folder of audits belongs to, without the seed."""
    return {
        "url": target.endpoint.url,
        "model": target.model,
        "reference": claim.model_dump(mode="json"),
        **{key: value for key, value in asdict(options).items() if key not in NOT_PLANNED},
        "corpus": pinned(options.corpus),
        "honest": [[each.endpoint.url, each.model] for each in honest],
        "profile": profile and profile.digest,
    }


def _folder(work: dict[str, Any], options: Options) -> RunFolder:
    """The run's folder, with the seed that it has, or a new one."""
    plan = run_plan("audit", work)
    path = options.out or default_folder("audit", plan)
    known = read_json(path / "plan.json") if (path / "plan.json").is_file() else {}
    kept = known.get("seed") if isinstance(known, dict) else None
    seed = options.seed if options.seed is not None else kept
    return RunFolder(path, plan | {"seed": seed if isinstance(seed, int) else secrets.randbelow(2**63)})


def _lines(session: Session, asking: Asking, scores: Sequence[float | None]) -> list[Item]:
    """What a ledger keeps of the answers. The limit is that of the profile: all answers have one."""
    items = []
    for number, score in enumerate(scores):
        answer = session.answer(0, number)
        prompt, output = digest_json(answer["prompt_ids"]), digest_json(answer)
        named: dict[str, Any] = {
            "request": digest_json([prompt, session.folder.run_id, number]),
            "prompt": prompt,
            "output": output,
        }
        if score is None:
            why = str(answer.get("error", "no-evidence"))
            items.append(Item(**named, undecided=why if why.replace("-", "").isalpha() else "not-answered"))
        else:
            items.append(Item(**named, score=score, limit=asking.positions))
    return items


def _described(profile: AuditProfile) -> dict[str, Any]:
    scores = sorted(profile.scores)
    return {
        "digest": profile.digest,
        "servers": list(profile.servers),
        "answers": len(scores),
        "scores": scores,
        "created": profile.created.isoformat(),
        "expires": profile.expires.isoformat(),
    }

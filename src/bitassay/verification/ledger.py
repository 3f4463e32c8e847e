"""A ledger: the scores of one host's requests, kept from call to call, and what they prove together.

`sequential.py` bounds the probability that an honest host *ever* gives an alarm, however often one looks, if
every request counts once and in its order. A ledger file sees to that. It is JSON lines, only ever appended
to: first whom and what it is about, then a line for each request,

    {"schema_version": 1, "profile": digest, "host": public key or null}
    {"trace": digest, "score": ..., "limit": ..., "log_wealth": ..., "time": ...}

with the digest of the trace's header (model, request, tokens), so that no trace counts twice. `log_wealth`
follows from the lines above it and the profile; it takes longer to compute than to read.

An honest host has a probability of at most alpha that its ledger ever gives an alarm at alpha, if requests
are like the calibration prompts and every scored trace of the host goes in, whatever its verdict. One ledger
is for one host and one profile. Traces with a structural defect do not count: they prove their case alone,
and somebody else may have made them of an honest host's trace.
"""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitassay.errors import BitassayError
from bitassay.record.files import explained, locked
from bitassay.record.hashing import canonical_json
from bitassay.verification.container import first_defect
from bitassay.verification.profile import Profile
from bitassay.verification.scores import Finite
from bitassay.verification.sequential import wealth_by_limit
from bitassay.verification.trace import TOKENS, Digest
from bitassay.verification.verdict import Verdict

SCHEMA_VERSION = 1
LIMIT_BYTES = 64 * 2**20
REMEDY = "put a copy of the file back, or begin a new --ledger FILE"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Kind = TypeVar("Kind", bound=_Part)


class Binding(_Part):
    """What a ledger is about: the digest of the profile that scores, and the host's public key in hex where
    it signs."""

    schema_version: Literal[1] = SCHEMA_VERSION
    profile: Digest
    host: Digest | None


class Line(_Part):
    """One request. limit: generated positions, see `Profile.p_value`. log_wealth: of `wealth_by_limit` after
    it."""

    trace: Digest
    score: Finite
    limit: Annotated[int, Field(ge=1, le=TOKENS)]
    log_wealth: Finite
    time: datetime


class Scored(NamedTuple):
    """What a verdict adds to a ledger."""

    trace: str
    score: float
    limit: int


def scored(verdicts: Sequence[Verdict], profile: Profile) -> list[Scored]:
    """Return those that count, in their order: scored by `profile` and structurally sound."""
    digest = profile.digest
    return [
        Scored(verdict.trace, verdict.score.value, verdict.limit)
        for verdict in verdicts
        if verdict.trace
        and verdict.score
        and verdict.limit
        and verdict.profile == digest
        and not verdict.structural
    ]


def extended(lines: Sequence[Line], new: Sequence[Scored], profile: Profile) -> list[Line]:
    """Return `lines`, and one for each of `new` that they do not have yet."""
    known: set[str] = {line.trace for line in lines}
    fresh: dict[str, Scored] = {}
    for request in new:
        if request.trace not in known:
            fresh.setdefault(request.trace, request)
    every = [*lines, *fresh.values()]
    wealth = wealth_by_limit(
        np.array([request.score for request in every]),
        [request.limit for request in every],
        lambda limit: np.array(profile.honest_scores(limit)),
        known=[line.log_wealth for line in lines],
    )
    now = datetime.now(UTC).replace(microsecond=0)
    return [
        *lines,
        *(
            Line(**request._asdict(), log_wealth=float(log_wealth), time=now)
            for request, log_wealth in zip(fresh.values(), wealth[len(lines) :], strict=True)
        ),
    ]


def update_ledger(path: Path, new: Sequence[Scored], profile: Profile, host: str | None = None) -> list[Line]:
    """Append to the ledger what it does not have yet, and return all its lines. A ledger that is not there is
    begun.

    Two calls at a time wait for each other. What one call appends is on the disk when it returns; a line that
    a crash cut off is dropped by the next. Raises BitassayError that names the file for a ledger of another
    profile or host, for anything that is no ledger, and where it cannot be written.
    """
    binding = Binding(profile=profile.digest, host=host)
    with _locked(Path(path)) as handle:
        size, lines = _read(handle, Path(path), binding.profile, host)
        every = extended(lines, new, profile)
        added = [*([binding] if not size else []), *every[len(lines) :]]
        text = "".join(canonical_json(line.model_dump(mode="json")) + "\n" for line in added)
        if size + len(text) > LIMIT_BYTES:
            raise BitassayError(
                f"{path}: would be longer than the {LIMIT_BYTES} bytes of a ledger",
                "begin a new --ledger FILE; its promise is its own",
            )
        os.ftruncate(handle, size)
        _append(handle, text.encode())
    return every


def check_ledger(path: Path, profile: Profile | None, host: str | None = None) -> None:
    """Raise as `update_ledger` would for the file that is there; of another profile, where one is given. It
    reads without the lock: what another process is appending is at worst a torn last line."""
    if path.exists():
        with explained(path), _opened(path, os.O_RDONLY) as handle:
            _read(handle, path, profile and profile.digest, host)


def _append(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _read(handle: int, path: Path, profile: str | None, host: str | None) -> tuple[int, list[Line]]:
    """Bytes of whole lines, and the requests in them, in a ledger of that profile (None: any) and host."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise BitassayError(f"{path}: not a regular file", "begin a new --ledger FILE")
    size = os.fstat(handle).st_size
    if size > LIMIT_BYTES:
        raise BitassayError(f"{path}: {size} bytes, more than the {LIMIT_BYTES} of a ledger", REMEDY)
    with os.fdopen(os.dup(handle), "rb") as stream:
        stream.seek(0)
        data = stream.read(size)
    *texts, torn = data.split(b"\n")
    if not texts:
        started = Binding(profile=profile or "0" * 64, host=host).model_dump(mode="json")
        if torn and profile and not canonical_json(started).encode().startswith(torn):
            raise BitassayError(f"{path}: not a ledger", "begin a new --ledger FILE")
        return 0, []
    bound = _parsed(Binding, texts[0], f"{path}, line 1")
    lines = [_parsed(Line, text, f"{path}, line {number}") for number, text in enumerate(texts[1:], 2)]
    if profile not in (None, bound.profile):
        raise BitassayError(
            f"{path}: a ledger of another profile ({bound.profile[:12]}, not {profile[:12]})",
            "give --profile the one it was begun with, or begin a new --ledger FILE",
        )
    if bound.host != host:
        raise BitassayError(
            f"{path}: a ledger of another host ({bound.host or 'unsigned'})",
            "keep one --ledger FILE for each host",
        )
    if len({line.trace for line in lines}) < len(lines):
        raise BitassayError(f"{path}: counts a trace twice", REMEDY)
    return len(data) - len(torn), lines


def _parsed(kind: type[Kind], text: bytes, where: str) -> Kind:
    try:
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        raise BitassayError(f"{where}: not a ledger: {first_defect(error)}", REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise BitassayError(f"{where}: not a ledger: not JSON", REMEDY) from error


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the file for reading and appending, for this process alone; it is made where it is missing."""
    with locked(path), explained(path), _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as handle:
        yield handle


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)

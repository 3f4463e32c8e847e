"""A ledger: one host's requests, kept from call to call, and what they prove together.

`sequential.py` bounds the probability that an honest host *ever* gives an alarm, however often one looks, if
every request counts once and in its order. A ledger file sees to that. It is JSON lines, only ever appended
to: first whom and what it is about, then a line for each request,

    {"schema_version": 2, "profile": digest, "host": public key or null, "budget": rate}
    {"request": digest, "prompt": digest, "output": digest, "commitment": digest or null,
     "score": ..., "limit": ..., "undecided": null or code, "time": ...}

named as in `accounting.py`, with a score or a reason why there is none. A request counts once; a second
answer to it is not written. Capitals are not kept but computed from these lines whenever they are read: a
file that says so is no evidence.

An honest host has a probability of at most alpha that its scores ever give an alarm at alpha, if requests are
like the calibration prompts and every sound answer of the host goes in, whatever its verdict; and one of at
most alpha that its undecided requests ever do, if at most `budget` of an honest host's requests stay
undecided. One ledger is for one host and one profile, and for at most LIMIT_LINES requests. Traces with a
structural defect do not count: they prove their case alone, and somebody else may have made them of an honest
host's trace. Neither does what the verifier's own lack leaves undecided: it can be judged again.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.record.files import explained, locked
from bitassay.record.hashing import canonical_json
from bitassay.record.schema import Fields
from bitassay.verification.container import TraceError, first_defect, strict_json
from bitassay.verification.profile import Profile
from bitassay.verification.scores import Finite
from bitassay.verification.sequential import SequentialEvidence, rate_wealth, wealth_by_limit
from bitassay.verification.trace import TOKENS, Digest

SCHEMA_VERSION = 2
LIMIT_BYTES = 2**23
LIMIT_LINES = 10_000
BUDGET = 0.1
REMEDY = "put a copy of the file back, or begin a new --ledger FILE"


Kind = TypeVar("Kind", bound=Fields)


class Binding(Fields):
    """What a ledger is about: the digest of the profile that scores, the host's public key in hex where it
    signs, and which rate of undecided requests is taken as an honest host's."""

    schema_version: Literal[2] = SCHEMA_VERSION
    profile: Digest
    host: Digest | None = None
    budget: Annotated[float, Field(gt=0, lt=1)] = BUDGET


class Item(Fields):
    """One request. request, prompt, output, commitment: see `accounting.Answer`; None: not known. limit:
    generated positions, see `Profile.p_value`. undecided: why there is no score."""

    request: Digest | None = None
    prompt: Digest | None = None
    output: Digest | None = None
    commitment: Digest | None = None
    score: Finite | None = None
    limit: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    undecided: Annotated[str, Field(pattern=r"^[a-z-]{1,64}$")] | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "Item":
        if (self.score is None) != (self.limit is None) or (self.score is None) == (self.undecided is None):
            raise ValueError("neither a score with its limit nor a reason why there is none")
        if self.score is not None and None in (self.request, self.prompt, self.output):
            raise ValueError("a score of an unknown request")
        return self


class Line(Item):
    """A request in a ledger, and when it was written there, in UTC."""

    time: datetime


def extended(lines: Sequence[Line], new: Sequence[Item]) -> list[Line]:
    """Return `lines`, and one for each of `new` whose request they do not have yet."""
    known = {line.request for line in lines} - {None}
    now, every = datetime.now(UTC).replace(microsecond=0), list(lines)
    for item in new:
        if item.request not in known:
            every.append(Line(**item.model_dump(), time=now))
            known |= {item.request} - {None}
    return every


def score_evidence(
    lines: Sequence[Line], honest: Callable[[int], Sequence[float]], alpha: float
) -> SequentialEvidence | None:
    """Return what the scores prove in their order, of the first scored answer to each prompt; None without
    any. honest: `Profile.honest_scores`."""
    scored = {line.prompt: line for line in reversed(lines) if line.score is not None}
    first = [line for line in lines if line.score is not None and scored[line.prompt] is line]
    wealth = wealth_by_limit(
        np.array([line.score for line in first], dtype=np.float64),
        [line.limit or 0 for line in first],
        lambda limit: np.array(honest(limit), dtype=np.float64),
    )
    return SequentialEvidence.of(wealth, alpha) if first else None


def undecided_evidence(lines: Sequence[Line], budget: float, alpha: float) -> SequentialEvidence | None:
    """Return what the undecided requests prove, of the first answer to each prompt; None without requests.
    The p-value and the alarm are of "more often undecided than `budget`"."""
    known = {line.prompt: line for line in reversed(lines)}
    first = [line for line in lines if line.prompt is None or known[line.prompt] is line]
    happened = np.array([line.undecided is not None for line in first], dtype=bool)
    return SequentialEvidence.of(rate_wealth(happened, budget), alpha) if first else None


def update_ledger(path: Path, new: Sequence[Item], binding: Binding) -> list[Line]:
    """Append to the ledger what it does not have yet, and return all its lines. A ledger that is not there is
    begun.

    Two calls at a time wait for each other. What one call appends is on the disk when it returns; a line that
    a crash cut off is dropped by the next. Raises BitassayError that names the file for a ledger of another
    profile, host or budget, for anything that is no ledger, for one that is full, and where it cannot be
    written.
    """
    with _locked(Path(path)) as handle:
        size, bound, lines = _read(handle, Path(path), binding)
        _check_bound(path, bound, binding.profile, binding.host, binding.budget)
        every = extended(lines, new)
        added = [*([binding] if not size else []), *every[len(lines) :]]
        text = "".join(canonical_json(line.model_dump(mode="json")) + "\n" for line in added)
        if size + len(text) > LIMIT_BYTES or len(every) > LIMIT_LINES:
            raise BitassayError(
                f"{path}: would be longer than the {LIMIT_LINES} requests of a ledger",
                "begin a new --ledger FILE; its promise is its own",
            )
        os.ftruncate(handle, size)
        _append(handle, text.encode())
    return every


def read_ledger(
    path: Path, profile: Profile | None, host: str | None = None, budget: float = BUDGET
) -> tuple[Binding | None, list[Line]]:
    """Return what a ledger is about and its lines; nothing where there is no file, or nothing in it. It reads
    without the lock: what another process is appending is at worst a torn last line. Raises as
    `update_ledger` would; for another profile, where one is given."""
    if not path.exists():
        return None, []
    with explained(path), _opened(path, os.O_RDONLY) as handle:
        _, bound, lines = _read(handle, path)
    _check_bound(path, bound, profile and profile.digest, host, budget)
    return bound, lines


def _append(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _read(handle: int, path: Path, binding: Binding | None = None) -> tuple[int, Binding | None, list[Line]]:
    """Bytes of whole lines, what they are about, and the requests in them. binding: what a first line that a
    crash cut off would have been."""
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
        started = binding and canonical_json(binding.model_dump(mode="json")).encode()
        if torn and started and not started.startswith(torn):
            raise BitassayError(f"{path}: not a ledger", "begin a new --ledger FILE")
        return 0, None, []
    if len(texts) - 1 > LIMIT_LINES:
        raise BitassayError(f"{path}: more than the {LIMIT_LINES} requests of a ledger", REMEDY)
    bound = _parsed(Binding, texts[0], f"{path}, line 1")
    lines = [_parsed(Line, text, f"{path}, line {number}") for number, text in enumerate(texts[1:], 2)]
    named = [line.request for line in lines if line.request]
    if len(set(named)) < len(named):
        raise BitassayError(f"{path}: counts a request twice", REMEDY)
    return len(data) - len(torn), bound, lines


def _check_bound(
    path: Path, bound: Binding | None, profile: str | None, host: str | None, budget: float
) -> None:
    """Raise BitassayError for a ledger of another profile (None: any), host or budget."""
    if bound is None:
        return
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
    if bound.budget != budget:
        raise BitassayError(
            f"{path}: a ledger with a budget of {bound.budget:g} for undecided requests, not {budget:g}",
            f"--inconclusive-budget {bound.budget:g}, or begin a new --ledger FILE",
        )


def _parsed(kind: type[Kind], text: bytes, where: str) -> Kind:
    try:
        content = strict_json(text, Path(where))
    except TraceError as error:
        problem = "a key twice" if error.code == "duplicate-key" else "not JSON"
        raise BitassayError(f"{where}: not a ledger: {problem}", REMEDY) from error
    if kind is Binding and isinstance(content, dict) and content.get("schema_version") == 1:
        raise BitassayError(
            f"{where}: a ledger of version 1, which does not say what requests its scores are of",
            "begin a new --ledger FILE; the alarm of an old one stands for itself",
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BitassayError(f"{where}: not a ledger: {first_defect(error)}", REMEDY) from error


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

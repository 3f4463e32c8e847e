"""Digests of large files that have not changed, remembered: no verb reads 65 GB to say which model it is."""

import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitassay.errors import BitassayError
from bitassay.models.source import cache_folder
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json

REMEMBERED_BYTES = 2**26  # files that are smaller are read again: it takes no time
SETTLED_S = 2.0  # a file that changed so short ago may change again with the same time stamp
KIND = "bitassay weights 1"


def remembered(files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the digest of `files` that `compute` returns, from the cache folder where it is known for files
    of these paths, sizes, inodes and times of change (to the nanosecond).

    A time of modification can be set to any value, the time of a change of status (ctime) cannot: so both
    count, and a file that was written over with its old time is read again. What an attacker gains who can
    write entries of the cache: a model of other weights goes by the digest that he chose, which `prove` puts
    into traces and `verify` compares with them. Entries count only where the user (or root) owns them and
    nobody else can write them. Whoever can write those can also replace the model's files, profiles and
    quantized results of that user, so it gives him nothing new; but where the weights are better protected
    than the cache folder, keep BITASSAY_CACHE as well protected. A damaged entry is ignored and replaced.
    """
    before, started = _stamps(files), time.time_ns()
    if sum(size for _, size, *_ in before) < REMEMBERED_BYTES:
        return compute()
    entry = cache_folder() / "digests" / f"{digest_json([KIND, before])}.json"
    if (digest := _read(entry, before)) is not None:
        return digest
    digest = compute()
    settled = started - int(SETTLED_S * 1e9)
    if _stamps(files) == before and all(max(times) < settled for *_, times in before):
        with suppress(BitassayError):  # of a cache that cannot be written: it is read again the next time
            write_json(entry, {"files": before, "digest": digest})
            entry.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return digest


def _stamps(files: Sequence[Path]) -> list[Any]:
    """Path, size, inode and times of each file, as JSON values."""
    stamps = []
    for path in sorted(file.resolve() for file in files):
        info = path.stat()
        stamps.append([str(path), info.st_size, info.st_ino, [info.st_mtime_ns, info.st_ctime_ns]])
    return stamps


def _read(entry: Path, stamps: list[Any]) -> str | None:
    """The digest in an entry that is whole, is of these files, and that nobody else can have written."""
    try:
        info, said = entry.stat(), read_json(entry)
    except (OSError, BitassayError):
        return None
    if hasattr(os, "getuid") and (info.st_uid not in (0, os.getuid()) or info.st_mode & 0o022):
        return None
    if not isinstance(said, dict) or said.get("files") != stamps:
        return None
    digest = said.get("digest")
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None

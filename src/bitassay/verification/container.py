"""Reading files that may come from anyone: sizes before content, strict JSON, safetensors entries that tile.

Traces, receipts and openings share this. Every defect is a TraceError with a short stable code.
"""

import json
import os
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bitassay.errors import BitassayError
from bitassay.record.files import explain_os_error

FILE_BYTES = 2**32
HEADER_BYTES = 2**23
HEADER_KEY = "bitassay"


class TraceError(BitassayError):
    """A defect of a trace file; `code` is short and stable, such as "truncated" or "wrong-shape"."""

    def __init__(self, code: str, problem: str):
        super().__init__(
            f"{problem} [{code}]",
            "ask the prover for the trace again; a prover that cannot send a whole one has failed",
        )
        self.code = code


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a regular file of at most `limit_bytes`. Raises TraceError, or BitassayError where there
    is no file to read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TraceError("not-a-file", f"{path}: not a regular file")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit_bytes:
                raise TraceError("oversize", f"{path}: {size} bytes; at most {limit_bytes} are read")
            return stream.read(limit_bytes)
    except OSError as error:
        raise explain_os_error(error, path) from error


def declared_size(first: bytes, size: int, path: Path) -> int:
    """The length of the safetensors header, once it is plausible."""
    if len(first) < 8:
        raise TraceError("truncated", f"{path}: {size} bytes; a trace has more than 8")
    if size > FILE_BYTES:
        raise TraceError("oversize", f"{path}: {size} bytes; at most {FILE_BYTES} are read")
    declared = int.from_bytes(first, "little")
    if declared > HEADER_BYTES:
        raise TraceError(
            "header-oversize",
            f"{path}: declares a header of {declared} bytes; at most {HEADER_BYTES} are read",
        )
    if declared > size - 8:
        raise TraceError(
            "truncated", f"{path}: declares a header of {declared} bytes, {size - 8} are left in the file"
        )
    return declared


def read_metadata(raw: bytes, path: Path) -> tuple[dict[str, Any], Any]:
    """The safetensors entries by tensor name, and the JSON value of the one metadata entry that is ours."""
    entries = strict_json(raw, path)
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if (
        not isinstance(metadata, dict)
        or set(metadata) != {HEADER_KEY}
        or not isinstance(metadata[HEADER_KEY], str)
    ):
        raise TraceError("not-a-trace", f"{path}: a safetensors file without a bitassay header")
    return entries, strict_json(metadata[HEADER_KEY], path)


def strict_json(raw: str | bytes, path: Path) -> Any:
    """JSON without duplicate keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise TraceError("duplicate-key", f"{path}: a JSON object has a key twice")
        return found

    def refuse(constant: str) -> None:
        raise TraceError("header-malformed", f"{path}: {constant} in the header")

    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        if "\\u" in text:  # half a surrogate pair is valid JSON, but no text that could be hashed or printed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except TraceError:
        raise
    except (ValueError, RecursionError) as error:
        raise TraceError("header-malformed", f"{path}: the header is not JSON ({error!s:.80})") from error


def tensor_entry(name: str, entry: Any, path: Path) -> tuple[list[int], list[int], str]:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(), int()] as offsets,
            **rest,
        } if not rest:
            if len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
                return shape, list(offsets), dtype
    raise TraceError("malformed", f"{path}: {name!r:.80} is not a safetensors entry")


def check_tiling(spans: list[list[int]], data_bytes: int, path: Path) -> None:
    """The tensors' byte ranges must cover the `data_bytes` behind the header, each byte once."""
    spans = sorted(spans)
    if spans[0][0] != 0 or any(a[1] != b[0] for a, b in pairwise(spans)):
        raise TraceError("wrong-offsets", f"{path}: the tensors overlap or leave gaps")
    if spans[-1][1] != data_bytes:
        code = "truncated" if spans[-1][1] > data_bytes else "trailing-bytes"
        raise TraceError(code, f"{path}: the tensors need {spans[-1][1]} bytes, the file has {data_bytes}")


def first_defect(error: ValidationError) -> str:
    """Return the first thing that is wrong with the fields of a file, without what the file says there."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "content"
    return f"{place:.80}: {first['msg']}"

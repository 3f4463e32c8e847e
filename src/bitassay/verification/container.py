"""Reading files that may come from anyone: sizes before content, strict JSON, safetensors whose tensors tile.

Traces, receipts and openings share this. Every defect is a TraceError with a short stable code.
"""

import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from bitassay.errors import BitassayError
from bitassay.record.files import explain_os_error

FILE_BYTES = 2**32
UNEXPECTED_BYTES = 2**30  # of a file about whose content the reader knows nothing
HEADER_BYTES = 2**23
HEADER_KEY = "bitassay"
Entry = tuple[str, list[int]]  # dtype (as torch names it, where it is known) and shape of a tensor

Claims = TypeVar("Claims")


class TraceError(BitassayError):
    """A defect of a trace file; `code` is short and stable, such as "truncated" or "wrong-shape"."""

    def __init__(self, code: str, problem: str):
        super().__init__(
            f"{problem} [{code}]",
            "ask the prover for the trace again; a prover that cannot send a whole one has failed",
        )
        self.code = code


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """Return the bytes of a regular file of at most `limit_bytes`. Raises TraceError, or BitassayError where
    there is no file to read."""
    with open_regular(path, limit_bytes) as stream:
        return stream.read(limit_bytes)


@contextmanager
def open_regular(path: Path, limit_bytes: int = FILE_BYTES) -> Iterator[BinaryIO]:
    """Open a regular file of at most `limit_bytes`. Raises as `read_regular` does."""
    try:
        if path.is_symlink() and not path.exists():
            raise TraceError("not-a-file", f"{path}: a link to nowhere")
        if not stat.S_ISREG(path.stat().st_mode):
            raise TraceError("not-a-file", f"{path}: not a regular file")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit_bytes:
                raise TraceError("oversize", f"{path}: {size} bytes; at most {limit_bytes} are read")
            yield stream
    except OSError as error:
        raise explain_os_error(error, path) from error


def read_tensors(
    stream: BinaryIO | io.BytesIO, path: Path, check: Callable[[Any, dict[str, Entry]], Claims]
) -> tuple[Claims, dict[str, Tensor]]:
    """Return what a safetensors file claims and its tensors by name. check: it sees the JSON value of the one
    metadata entry that is ours, and dtype and shape of each tensor, before a byte of these is read; it
    returns the claims, or raises TraceError. Tensors are read one at a time, each to its place."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    first = stream.read(8)
    if len(first) < 8:
        raise TraceError("truncated", f"{path}: {size} bytes; a trace has more than 8")
    declared = int.from_bytes(first, "little")
    if declared > HEADER_BYTES:
        problem = f"declares a header of {declared} bytes; at most {HEADER_BYTES} are read"
        raise TraceError("header-oversize", f"{path}: {problem}")
    if declared > size - 8:
        problem = f"declares a header of {declared} bytes, {size - 8} are left in the file"
        raise TraceError("truncated", f"{path}: {problem}")
    listed = strict_json(stream.read(declared), path)
    metadata = listed.pop("__metadata__", None) if isinstance(listed, dict) else None
    match metadata:
        case {"bitassay": str(text), **rest} if not rest:
            content = strict_json(text, path)
        case _:
            raise TraceError("not-a-trace", f"{path}: a safetensors file without a bitassay header")
    entries = {name: _tensor_entry(name, entry, path) for name, entry in listed.items()}
    claims = check(content, {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()})
    for name, (dtype, shape, offsets) in entries.items():
        if offsets[1] - offsets[0] != math.prod(shape) * getattr(torch, dtype).itemsize:
            problem = f"{name} declares bytes {offsets}, its shape {shape} needs another number"
            raise TraceError("wrong-offsets", f"{path}: {problem}")
    _check_tiling(sorted(offsets for *_, offsets in entries.values()), size - 8 - declared, path)
    return claims, {
        name: _read_tensor(stream, 8 + declared + offsets[0], getattr(torch, dtype), shape, path)
        for name, (dtype, shape, offsets) in entries.items()
    }


def _read_tensor(
    stream: BinaryIO | io.BytesIO, start: int, dtype: torch.dtype, shape: list[int], path: Path
) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    stream.seek(start)
    rest = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    while rest:
        if not (count := stream.readinto(rest)):  # type: ignore[union-attr]
            raise TraceError("truncated", f"{path}: it became shorter while it was read")
        rest = rest[count:]
    return tensor


def strict_json(raw: str | bytes, path: Path) -> Any:
    """Return the value of JSON without duplicate keys, NaN or infinity. Raises TraceError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise TraceError("duplicate-key", f"{path}: a JSON object has a key twice")
        return fields

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


def _tensor_entry(name: str, entry: Any, path: Path) -> tuple[str, list[int], list[int]]:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(), int()] as offsets,
            **rest,
        } if not rest:
            if len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
                known = str_to_torch_dtype.get(dtype)
                in_torch = str(known).removeprefix("torch.") if known else f"unknown {dtype!r:.20}"
                return in_torch, shape, list(offsets)
    raise TraceError("malformed", f"{path}: {name!r:.80} is not a safetensors entry")


def _check_tiling(spans: list[list[int]], data_bytes: int, path: Path) -> None:
    """Raise TraceError unless the byte ranges cover the `data_bytes` behind the header, each byte once."""
    if not spans or spans[0][0] != 0 or any(a[1] != b[0] for a, b in pairwise(spans)):
        raise TraceError("wrong-offsets", f"{path}: the tensors overlap or leave gaps")
    if spans[-1][1] != data_bytes:
        code = "truncated" if spans[-1][1] > data_bytes else "trailing-bytes"
        raise TraceError(code, f"{path}: the tensors need {spans[-1][1]} bytes, the file has {data_bytes}")


def is_version(found: Any, expected: int) -> bool:
    """Return whether `found` is this number, and neither true nor 1.0, which are equal to it: other spellings
    of the same file."""
    return type(found) is int and found == expected


def first_defect(error: ValidationError) -> str:
    """Return the first thing that is wrong with the fields of a file, without what the file says there."""
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "content"
    return f"{field:.80}: {first['msg']}"

"""Digests: how a recipe, a file or a set of weights is named so that two people mean the same thing.

All are SHA-256 in lower-case hex. A digest of weights covers names, dtypes, shapes and bytes in the order of
the names, so that it does not depend on how a checkpoint is sharded, but does change when a weight is cast.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_json(value: Any) -> str:
    """Return the digest of a value as canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tensors(tensors: "Iterable[tuple[str, Tensor]]") -> str:
    """Return the digest of named tensors, sorted by name so that they can be streamed from disk."""
    import torch

    sha = hashlib.sha256(b"bitassay weights 1\0")
    previous = ""
    for name, tensor in tensors:
        assert previous < name, f"tensors out of order: {previous} before {name}"
        previous = name
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

"""The host's Ed25519 key: one PEM file (PKCS 8, no password) that only its owner may read; and which public
keys are believed.

A signature (R, s) is valid under the public key A where s B = R + H(R | A | message) A. If A is of small
order, a factor of 8, then there are R and s that anybody can write down and that are valid for any message;
if it has a part of small order, one signature can be valid to one verifier and not to another; and if its y
is not below p, one key has two spellings. Libraries take all of these (OpenSSL does), so `is_sound` asks that

    A is the canonical encoding of a point of the curve, A is not the identity, and L A is the identity,

that is, of prime order L. Sources: RFC 8032 (the curve, the decoding of points, the addition formulas);
Chalkias, Garillot, Nikolaenko 2020 ("Taming the many EdDSAs", where keys of small order break strong
binding).
"""

import os
import re
import stat
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from bitassay.errors import BitassayError
from bitassay.record.files import explain_os_error

KEY_BYTES = 2**12
FIELD = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, FIELD) % FIELD
_ROOT = pow(2, (FIELD - 1) // 4, FIELD)  # of -1

_Point = tuple[int, int, int, int]  # X, Y, Z, T with x = X / Z, y = Y / Z, x y = T / Z


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """Return the key in `path`; a missing file is made, with a new key. Raises BitassayError for a file that
    others may read or that is no such key."""
    path = Path(path)
    try:
        return read_key(path) if path.exists() else _new_key(path)
    except FileExistsError:  # made by another process just now
        return read_key(path)
    except OSError as error:
        raise explain_os_error(error, path) from error


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key in PEM. Raises BitassayError for a file that others may read or is no such key."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > KEY_BYTES:
        raise BitassayError(f"{path}: not a private key", "name a file that does not exist to make one")
    if status.st_mode & 0o077:
        raise BitassayError(f"{path}: others may read this private key", f"chmod 600 {path}")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BitassayError(
            f"{path}: not a private key without a password", "name a file that does not exist to make one"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BitassayError(f"{path}: not an Ed25519 key", "name a file that does not exist to make one")
    return key


def public_key(text: str) -> bytes:
    """Return the 32 bytes of a public key in lower-case hex. Raises BitassayError for any other text, and for
    a key that is not sound."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise BitassayError(
            f"{text[:80]!r} is not a public key", "the 64 hex digits that bitassay prove prints"
        )
    key = bytes.fromhex(text)
    if not is_sound(key):
        raise BitassayError(
            f"{text} is not a public key that can be believed: it is not of prime order",
            "ask the host for another; bitassay prove makes one",
        )
    return key


@lru_cache(maxsize=256)
def is_sound(key: bytes) -> bool:
    """Return whether `key` is the one encoding of a point of prime order."""
    point = _decoded(key)
    return point is not None and not _is_identity(point) and _is_identity(_times(ORDER, point))


def _decoded(key: bytes) -> _Point | None:
    """Return the point that 32 bytes encode (RFC 8032, 5.1.3); None where they do not, or not canonically."""
    number = int.from_bytes(key, "little")
    y, is_odd = number & (2**255 - 1), number >> 255
    if len(key) != 32 or y >= FIELD:
        return None
    u, v = y * y - 1, _D * y * y + 1
    x = u * v**3 * pow(u * v**7, (FIELD - 5) // 8, FIELD) % FIELD
    if (v * x * x - u) % FIELD:
        x = x * _ROOT % FIELD
    if (v * x * x - u) % FIELD or (x == 0 and is_odd):
        return None
    x = FIELD - x if x % 2 != is_odd else x
    return x, y, 1, x * y % FIELD


def _times(n: int, point: _Point) -> _Point:
    result: _Point = (0, 1, 1, 0)
    while n:
        result = _sum(result, point) if n & 1 else result
        point, n = _sum(point, point), n >> 1
    return result


def _sum(p: _Point, q: _Point) -> _Point:
    """Add two points (RFC 8032, 5.1.4); complete, so it doubles as well."""
    a, b = (p[1] - p[0]) * (q[1] - q[0]), (p[1] + p[0]) * (q[1] + q[0])
    c, d = 2 * p[3] * q[3] * _D, 2 * p[2] * q[2]
    e, f, g, h = b - a, (d - c) % FIELD, (d + c) % FIELD, b + a
    return e * f % FIELD, g * h % FIELD, f * g % FIELD, e * h % FIELD


def _is_identity(point: _Point) -> bool:
    return point[0] % FIELD == 0 and (point[1] - point[2]) % FIELD == 0


def _new_key(path: Path) -> Ed25519PrivateKey:
    # Not by `record.files`, whose files are as readable as any other: this one must never have been.
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(pem)
        stream.flush()
        os.fsync(stream.fileno())
    return key

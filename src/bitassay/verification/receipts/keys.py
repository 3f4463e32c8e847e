"""The host's Ed25519 key: one PEM file (PKCS 8, no password) that only its owner may read."""

import os
import stat
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
    """Return the 32 bytes of a public key in hex. Raises BitassayError for any other text."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise BitassayError(
            f"{text[:80]!r} is not a public key", "the 64 hex digits that bitassay prove prints"
        )
    return key


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

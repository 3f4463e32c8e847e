"""The receipt: what a host signs for one request before it knows which cells it will have to show.

    commitment = H("bitassay commitment 1" | Merkle root | H(canonical JSON of the header))
    signature  = Ed25519(private key, "bitassay receipt 1" | commitment)

so that every field of the header (model and recipe digests, numerics, sampling, nonce, token ids, layers,
positions) and every cell is bound. Ed25519 is RFC 8032, by the `cryptography` package.

A receipt is whole in itself: it holds the header, the root, the public key and the signature. Written, it is
one line of JSON, a list. Digests are base64, and token ids are four bytes each before base64, which makes 5.3
bytes a token. Positions are not written: they are always those of prompt and output but for the last token.
Only the one spelling that `encode` gives is read, so a receipt cannot be altered without breaking the
signature. It is version 1 where the numerics have the eight fields that every header has, else version 2,
which lists all fields.

What it leaves out: time (a signature says who, not when; the verifier's nonce and beacon say after what) and
who owns the key. The verifier must learn the public key by another way, and say so; a receipt by any other
key proves nothing.
"""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bitassay.record.files import write_bytes
from bitassay.record.hashing import canonical_json
from bitassay.verification.container import TraceError, read_regular, strict_json
from bitassay.verification.numerics import Numerics
from bitassay.verification.receipts.keys import is_sound
from bitassay.verification.receipts.merkle import cell_leaves, merkle_root
from bitassay.verification.trace import Header, Sampling, Trace, check_consistent, validate_header

RECEIPT_BYTES = 2**22
COMMITMENT, SIGNED = b"bitassay commitment 1\0", b"bitassay receipt 1\0"
_VERSION, _VERSION_2 = "bitassay receipt 1", "bitassay receipt 2"
_NUMERICS = {_VERSION: tuple(Numerics.model_fields)[:8], _VERSION_2: tuple(Numerics.model_fields)}
_DIGESTS = ("weights_digest", "tokenizer_digest", "recipe_id", "config_digest")  # the last may be missing
_CLAIMS = ("version", "model", "numerics", "sampling", "nonce", "layers", "prompt", "ids")
_FIELDS = (*_CLAIMS, "root", "key", "signature")


@dataclass(frozen=True)
class Receipt:
    """root: of the Merkle tree over all cells. key: the public key, 32 bytes. signature: 64 bytes."""

    header: Header
    root: bytes
    key: bytes
    signature: bytes = b""

    @property
    def commitment(self) -> bytes:
        """What was committed to, whoever signed it."""
        return commitment_of(self.root, self.header)

    @property
    def n_cells(self) -> int:
        return len(self.header.positions) * len(self.header.layers)


def commit(trace: Trace, key: Ed25519PrivateKey) -> Receipt:
    """Return the signed receipt of `trace`. Raises TraceError for a trace that is not consistent in
    itself."""
    check_consistent(trace)
    receipt = Receipt(trace.header, merkle_root(trace_leaves(trace)), key.public_key().public_bytes_raw())
    _check_positions(receipt.header, "trace")
    return replace(receipt, signature=key.sign(SIGNED + receipt.commitment))


def commitment_of(root: bytes, header: Header) -> bytes:
    """Return what is committed to by a Merkle root and a header."""
    digest = hashlib.sha256(canonical_json(header.model_dump(mode="json")).encode()).digest()
    return hashlib.sha256(COMMITMENT + root + digest).digest()


def trace_leaves(trace: Trace) -> list[bytes]:
    """Return the Merkle leaves of all cells of a trace."""
    header = trace.header
    states = {layer: trace.states[layer] for layer in header.layers}
    return cell_leaves(states, header.positions, header.numerics.dtype)


def check_signature(receipt: Receipt, where: str = "receipt") -> None:
    """Raise the TraceError "bad-signature" unless the receipt's own key signed it, and "weak-key" where
    others than its owner could have."""
    try:
        key = Ed25519PublicKey.from_public_bytes(receipt.key)
        key.verify(receipt.signature, SIGNED + receipt.commitment)
    except (InvalidSignature, ValueError) as error:
        raise TraceError("bad-signature", f"{where}: its key has not signed these claims") from error
    if not is_sound(receipt.key):
        problem = "its key is not of prime order, so anybody could have signed"
        raise TraceError("weak-key", f"{where}: {problem}")


def write_receipt(path: str | Path, receipt: Receipt) -> None:
    """Write a receipt, whole or not at all."""
    write_bytes(path, encode(receipt))


def read_receipt(path: str | Path) -> Receipt:
    """Read a receipt that may come from anyone and check its signature. Raises TraceError for each defect of
    the content, BitassayError where there is no file to read."""
    path = Path(path)
    receipt = decode(read_regular(path, RECEIPT_BYTES), path)
    check_signature(receipt, str(path))
    return receipt


def encode(receipt: Receipt) -> bytes:
    """Return one line of JSON: a list of the fields' values, without their names, which would be a sixth of
    it."""
    header = receipt.header
    ids = np.array([*header.prompt_ids, *header.output_ids], "<u4")
    version = _VERSION if set(header.numerics.model_dump()) == set(_NUMERICS[_VERSION]) else _VERSION_2
    names = _DIGESTS if header.model.config_digest else _DIGESTS[:-1]
    digests = (getattr(header.model, name) for name in names)
    content = {
        "version": version,
        "model": [header.model.name, *(_text(bytes.fromhex(each)) if each else None for each in digests)],
        "numerics": [getattr(header.numerics, name) for name in _NUMERICS[version]],
        "sampling": list(header.sampling.model_dump().values()),
        "nonce": header.nonce,
        "layers": list(header.layers),
        "prompt": len(header.prompt_ids),
        "ids": _text(ids.tobytes()),
        "root": _text(receipt.root),
        "key": _text(receipt.key),
        "signature": _text(receipt.signature),
    }
    return (canonical_json([content[name] for name in _FIELDS]) + "\n").encode()


def decode(data: bytes, where: Path) -> Receipt:
    """Return the receipt in `data`; its signature is not checked here. Raises TraceError."""
    values = strict_json(data, where)
    if not isinstance(values, list) or len(values) != len(_FIELDS) or values[0] not in (_VERSION, _VERSION_2):
        raise TraceError("not-a-receipt", f"{where}: not a {_VERSION!r} or {_VERSION_2!r}")
    content: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    model, prompt = content["model"], content["prompt"]
    if not isinstance(model, list) or len(model) - 1 not in (len(_DIGESTS), len(_DIGESTS) - 1):
        raise TraceError("header-field", f"{where}: model is not a list of a name and its digests")
    ids = np.frombuffer(_binary(content, "ids", None, where), "<u4").tolist()
    if type(prompt) is not int or not 0 < prompt < len(ids):
        raise TraceError("header-field", f"{where}: no prompt and output of {len(ids)} token ids")
    digests = {
        name: None if value is None else _binary({name: value}, name, 32, where).hex()
        for name, value in zip(_DIGESTS, model[1:], strict=False)
    }
    header = validate_header(
        {
            "schema_version": 1,
            "model": {"name": model[0], **digests},
            "numerics": _named(content, "numerics", _NUMERICS[content["version"]], where),
            "sampling": _named(content, "sampling", tuple(Sampling.model_fields), where),
            "nonce": content["nonce"],
            "prompt_ids": ids[:prompt],
            "output_ids": ids[prompt:],
            "layers": content["layers"],
            "positions": tuple(range(len(ids) - 1)),
        },
        str(where),
    )
    if len(set(header.layers)) != len(header.layers):
        raise TraceError("duplicate-layer", f"{where}: a layer is named twice in {header.layers[:8]}")
    sizes = {"root": 32, "key": 32, "signature": 64}
    receipt = Receipt(header, *(_binary(content, name, size, where) for name, size in sizes.items()))
    if encode(receipt) != data:
        raise TraceError("not-canonical", f"{where}: spelled in another way than receipts are")
    return receipt


def _check_positions(header: Header, where: str) -> None:
    count = len(header.prompt_ids) + len(header.output_ids) - 1
    if header.positions != tuple(range(count)):
        raise TraceError(
            "wrong-positions", f"{where}: positions are not 0 to {count - 1} in order, each once"
        )


def _named(content: dict[str, Any], name: str, fields: Sequence[str], where: Path) -> dict[str, Any]:
    """Return a list of values by the names of a part's fields, in their order."""
    values = content[name]
    if not isinstance(values, list) or len(values) != len(fields):
        raise TraceError("header-field", f"{where}: {name} is not a list of {len(fields)}")
    return dict(zip(fields, values, strict=True))


def base64_text(data: bytes) -> str:
    """Return base64 without padding."""
    return b64encode(data).decode().rstrip("=")


def base64_bytes(text: Any, name: str, size: int | None, where: Path) -> bytes:
    """Return what `base64_text` made `text` of: `size` bytes, or any number. Raises TraceError."""
    try:
        data = b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (TypeError, ValueError) as error:
        raise TraceError("header-field", f"{where}: {name} is not base64") from error
    if size is not None and len(data) != size:
        raise TraceError("header-field", f"{where}: {name} has {len(data)} bytes")
    return data


_text = base64_text


def _binary(content: dict[str, Any], name: str, size: int | None, where: Path) -> bytes:
    """Return a field's bytes: `size`, or any whole number of 4-byte words."""
    data = base64_bytes(content[name], name, size, where)
    if len(data) % 4:
        raise TraceError("header-field", f"{where}: {name} has {len(data)} bytes")
    return data

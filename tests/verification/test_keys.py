"""Public keys that would make a receipt of nobody valid are refused, wherever they come from."""

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bitassay.errors import BitassayError
from bitassay.verification.receipts.keys import is_sound, public_key
from bitassay.verification.receipts.receipt import SIGNED, Receipt, encode, read_receipt
from bitassay.verification.verify import verify_opening
from verification.receipts import KEY, OTHER_KEY, SIGNER, codes, refused, signed

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def on_curve(y, odd):
    """The point of this y, in a few lines of its own (not those of the package); None where there is none."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if (x * x - square) % P == 0 else x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return (P - x if x % 2 != odd else x) % P, y


def add(a, b):
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def times(n, point):
    result = (0, 1)
    while n:
        result = add(result, point) if n & 1 else result
        point, n = add(point, point), n >> 1
    return result


def encoded(point, more=0, odd=None):
    sign = point[0] % 2 if odd is None else odd
    return (point[1] + more + (sign << 255)).to_bytes(32, "little")


def decoded(data):
    value = int.from_bytes(data, "little")
    return on_curve(value % 2**255, value >> 255)


def small_order():
    """The eight points whose order divides 8: L times any point that has a part of each of them."""
    point = next(at for y in range(2, 99) if (at := on_curve(y, 0)) and times(4 * L, at) != (0, 1))
    eighth = times(L, point)
    return [times(index, eighth) for index in range(8)]


TORSION = small_order()
IDENTITY = encoded((0, 1))
BAD = {
    **{f"of small order {index}": encoded(point) for index, point in enumerate(TORSION)},
    **{f"not reduced {y}": (y + P).to_bytes(32, "little") for y in range(19)},
    **{f"not reduced {y}, negative": (y + P + 2**255).to_bytes(32, "little") for y in range(19)},
    "identity with a sign": encoded((0, 1), odd=1),
    "minus one with a sign": encoded((0, P - 1), odd=1),
    **{f"of mixed order {index}": encoded(add(decoded(SIGNER), TORSION[index])) for index in range(1, 8)},
    "no point": next(y for y in range(2, 99) if on_curve(y, 0) is None).to_bytes(32, "little"),
    "all ones": b"\xff" * 32,
    "31 bytes": SIGNER[:31],
    "33 bytes": SIGNER + b"\0",
    "none": b"",
}


def unsigned(receipt, key):
    """A receipt that nobody signed: s = 0 and R = the key's negative times the hash, tried until it fits."""
    for point in TORSION:
        forged = Receipt(receipt.header, receipt.root, key, encoded(point) + bytes(32))
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(forged.signature, SIGNED + forged.commitment)
        except Exception:
            continue
        return forged
    return None


def test_the_points_are_those_of_the_curve():
    assert len(set(TORSION)) == 8
    assert (0, 1) in TORSION
    assert all(times(8, point) == (0, 1) for point in TORSION)
    assert times(L, decoded(SIGNER)) == (0, 1)


def test_a_receipt_that_nobody_signed_never_passes(receipt, asked, opening, model, profile, tmp_path):
    """Under the identity as a key, R = identity and s = 0 sign everything."""
    forged = unsigned(receipt, IDENTITY)
    assert forged is not None
    verdict = verify_opening(forged, asked, opening, model, signer=IDENTITY, profile=profile)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"weak-key"})
    (tmp_path / "x").write_bytes(encode(forged))
    refused("weak-key", read_receipt, tmp_path / "x")


@pytest.mark.parametrize("name", BAD)
def test_a_key_that_is_not_of_prime_order_is_refused(name, receipt, tmp_path):
    assert not is_sound(BAD[name])
    with pytest.raises(BitassayError, match="not a public key"):
        public_key(BAD[name].hex())
    if len(BAD[name]) == 32 and (forged := unsigned(receipt, BAD[name])):
        (tmp_path / "x").write_bytes(encode(forged))
        refused("weak-key", read_receipt, tmp_path / "x")


def test_a_signature_by_a_mixed_key_is_refused_although_openssl_takes_it(receipt, tmp_path):
    """The host adds a point of order 2 to its key; for even hashes the equation holds with it, too."""
    point = add(decoded(SIGNER), (0, P - 1))
    key, secret = encoded(point), hashlib.sha512(bytes(range(32))).digest()
    scalar = int.from_bytes(secret[:32], "little") & ~7 & (2**254 - 1) | 2**254
    base = on_curve(4 * pow(5, -1, P) % P, 0)
    forged = Receipt(receipt.header, receipt.root, key)
    message = SIGNED + forged.commitment
    for nonce in range(1, 99):
        R = encoded(times(nonce, base))
        hashed = int.from_bytes(hashlib.sha512(R + key + message).digest(), "little") % L
        if hashed % 2 == 0:
            s = (nonce + hashed * scalar) % L
            forged = Receipt(receipt.header, receipt.root, key, R + s.to_bytes(32, "little"))
            break
    Ed25519PublicKey.from_public_bytes(key).verify(forged.signature, message)
    (tmp_path / "x").write_bytes(encode(forged))
    refused("weak-key", read_receipt, tmp_path / "x")


def test_honest_keys_are_sound(receipt):
    for key in (KEY, OTHER_KEY):
        public = key.public_key().public_bytes_raw()
        assert is_sound(public)
        assert public_key(public.hex()) == public
        assert len(signed(receipt, key).signature) == 64


@pytest.mark.parametrize("spelling", ["{} ", " {}", "{}\n", "0x{}", "{}00", "-{}", ""])
def test_a_key_has_one_spelling(spelling):
    text = SIGNER.hex()
    wrong = [spelling.format(text), text.upper(), text[:32] + " " + text[32:], text[:32] + "\n" + text[32:]]
    wrong.append(text.replace(text[0], chr(0xFF10 + int(text[0], 16)), 1) if text[0].isdigit() else "é" * 64)
    for one in wrong:
        with pytest.raises(BitassayError, match="not a public key"):
            public_key(one)

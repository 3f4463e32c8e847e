"""A writer and a checker of small proofs by `docs/proof-format.md` alone, as another engine would have them. They
import nothing of the package: NumPy for arithmetic, hashlib for SHA-256 and SHA-512, base64 and json."""

import hashlib
import json
import math
from base64 import b64decode, b64encode

import numpy as np

STEP = {"bfloat16": -5, "float16": -8, "float32": -21}


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


# --- 1. the commitment ---


def leaf(layer, position, dtype, state):
    where = layer.to_bytes(4, "little") + position.to_bytes(4, "little")
    return sha256(b"\0bitassay cell 1\0", where, dtype.encode(), b"\0", state)


def root(leaves):
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return sha256(b"\1", root(leaves[:k]), root(leaves[k:]))


def commitment(header, cells):
    """header: the JSON object. cells: {layer: [bytes of the state at each position]}."""
    leaves = [
        leaf(layer, position, header["numerics"]["dtype"], cells[layer][index])
        for index, position in enumerate(header["positions"])
        for layer in header["layers"]
    ]
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256(b"bitassay commitment 1\0", root(leaves), sha256(text.encode()))


# --- 2. the signs ---


def philox(key, blocks):
    """Philox 4x64 with 10 rounds (Salmon et al. 2011), counters 1, 2, ...: four 64-bit words a block."""
    words, mask = [], 2**64 - 1
    for counter in range(1, blocks + 1):
        c, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(high >> 64) ^ c[1] ^ k[0], high & mask, (low >> 64) ^ c[3] ^ k[1], low & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words


def signs(commitment, position, nonce, hidden, k):
    seed = sha256(b"bitassay proof signs 1\0", commitment, position.to_bytes(4, "little"), nonce.encode())
    words = philox(int.from_bytes(seed[:16], "little"), math.ceil(k * hidden / 256))
    bits = [words[n // 64] >> (n % 64) & 1 for n in range(k * hidden)]
    return 1.0 - 2.0 * np.array(bits, dtype=np.float64).reshape(k, hidden)


# --- 3. the numbers ---


def exponent(states, dtype):
    norm = math.sqrt(np.mean(np.sum(np.square(states), axis=1)))
    return max(-128, min(127, math.floor(math.log2(norm)) + STEP[dtype])) if 0 < norm < math.inf else -128


def residues(states, first, commitment, nonce, dtype, size):
    """states: float64, those of the last sampled layer at the generated positions, from position `first` on."""
    e, out = exponent(states, dtype), bytearray()
    for index, state in enumerate(states):
        projected = signs(commitment, first + index, nonce, len(state), 2 * size) @ state
        q = [round(float(p) * 2.0**-e) % 16 for p in projected]  # round: halves go to the even number
        out += bytes(low | high << 4 for low, high in zip(q[0::2], q[1::2], strict=True))
    return e, bytes(out)


def errors(e, data, reference, first, commitment, nonce):
    """Return the mean square error of each position against the states `reference`."""
    size, found = len(data) // len(reference), []
    for index, state in enumerate(reference):
        packed = data[index * size : (index + 1) * size]
        q = [half for byte in packed for half in (byte & 15, byte >> 4)]
        projected = signs(commitment, first + index, nonce, len(state), 2 * size) @ state
        d = [((a - b * 2.0**-e + 8) % 16 - 8) * 2.0**e for a, b in zip(q, projected, strict=True)]
        found.append(sum(each * each for each in d) / len(d))
    return found


# --- 4. the file ---


def text(data):
    return b64encode(data).decode().rstrip("=")


def message(commitment, e, data):
    return b"bitassay proof 1\0" + commitment + bytes([e % 256]) + data


def write(states, first, commitment, nonce, dtype, size, secret):
    e, data = residues(states, first, commitment, nonce, dtype, size)
    signature = sign(secret, message(commitment, e, data))
    content = ["bitassay proof 1", text(commitment), e, text(data), text(signature)]
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def read(line, public):
    """Return commitment, exponent and residues of a file that `public` has signed."""
    version, *fields = json.loads(line)
    assert version == "bitassay proof 1"
    commitment, data, signature = (b64decode(fields[n] + "=" * (-len(fields[n]) % 4)) for n in (0, 2, 3))
    assert verify(public, message(commitment, fields[1], data), signature)
    return commitment, fields[1], data


# --- Ed25519 (RFC 8032), plainly: for tests, not for secrets ---

P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def add(p, q):
    (x1, y1), (x2, y2) = p, q
    t = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + y1 * x2) * pow(1 + t, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def times(n, p):
    result = (0, 1)
    while n:
        result, p, n = add(result, p) if n & 1 else result, add(p, p), n >> 1
    return result


def decode(data):
    y = int.from_bytes(data, "little") & (2**255 - 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square
    return (x if x % 2 == data[31] >> 7 else P - x), y


def encode(p):
    return (p[1] | (p[0] & 1) << 255).to_bytes(32, "little")


BASE = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def scalar(*parts):
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little") % L


def expanded(secret):
    h = hashlib.sha512(secret).digest()
    a = int.from_bytes(h[:32], "little") & ((1 << 254) - 8) | 1 << 254
    return a, h[32:]


def public_key(secret):
    return encode(times(expanded(secret)[0], BASE))


def sign(secret, data):
    a, prefix = expanded(secret)
    r = scalar(prefix, data)
    point = encode(times(r, BASE))
    s = (r + scalar(point, public_key(secret), data) * a) % L
    return point + s.to_bytes(32, "little")


def verify(public, data, signature):
    point, s = signature[:32], int.from_bytes(signature[32:], "little")
    right = add(decode(point), times(scalar(point, public, data), decode(public)))
    return s < L and times(s, BASE) == right

"""The bytes of llama.cpp's blocks, from codes and scales that are found elsewhere.

Every function takes codes `[out, in]` as whole numbers and one scale a block, and returns `[out, bytes]`.

Source: the layouts of ggml's block types, as the gguf package documents them by decoding them; its decoders,
and libllama's own (`benchmarks/llamacpp_types.py`), are the oracles.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from bitassay.models.gguf_types import Q1_RUN, Q2_RUN
from bitassay.quantization.shapes import Matrix

BLOCK, SUPER = 32, 256
Bytes = np.ndarray  # [rows, bytes]
Scales = Float[Tensor, "out blocks"]
Sixteens = Float[Tensor, "out sixteens"]  # a number for every 16 weights
Eights = Float[Tensor, "out thirty_twos"]  # for every 32, eight of them in a super-block


def q1_0(q: Matrix, d: Scales) -> Bytes:
    """18 bytes: d, then a bit for each of 128 weights, lowest first; q is 0 for -d or 1 for d."""
    bits = np.packbits(_runs(q, Q1_RUN).astype(np.uint8), axis=-1, bitorder="little")
    return _rows(half(d), bits)


def q2_0(q: Matrix, d: Scales) -> Bytes:
    """18 bytes: d, then q + 1 of 64 weights in two bits, lowest first."""
    codes = _runs(q + 1, Q2_RUN).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:2], -1, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)
    return _rows(half(d), np.bitwise_or.reduce(parts, axis=3))


def tq1_0(q: Matrix, d: Scales) -> Bytes:
    """54 bytes: q + 1 as digits to base 3, five to a byte in 32 and 16 bytes, four in the last 4; then d. A
    byte is the digits' fraction of 256, rounded up, so that multiplying by 3 takes them out again."""
    codes = _runs(q + 1, SUPER).astype(np.uint16)
    powers = np.array([81, 27, 9, 3, 1], dtype=np.uint16)[:, None]
    parts = [
        (codes[..., start:stop].reshape(*codes.shape[:2], digits, -1) * powers[:digits]).sum(axis=2)
        for start, stop, digits in ((0, 160, 5), (160, 240, 5), (240, 256, 4))
    ]
    return _rows(*(((part * 256 + 242) // 243).astype(np.uint8) for part in parts), half(d))


def tq2_0(q: Matrix, d: Scales) -> Bytes:
    """66 bytes: q + 1 in two bits, then d."""
    return _rows(_crumbs(q + 1), half(d))


def q8_0(q: Matrix, d: Scales) -> Bytes:
    """34 bytes: d, then the codes as int8."""
    return _rows(half(d), _runs(q, BLOCK).astype(np.int8).view(np.uint8))


def q4_0(q: Matrix, d: Scales) -> Bytes:
    """18 bytes: d, then q + 8, the first 16 weights in the low half of each byte, the others in the high."""
    return _rows(half(d), _nibbles(q + 8))


def q5_0(q: Matrix, d: Scales) -> Bytes:
    """22 bytes: d, the fifth bits of q + 16, lowest first, then the other four as in Q4_0."""
    codes = q + 16
    fifth = np.packbits(_runs(codes // 16, BLOCK).astype(np.uint8), axis=-1, bitorder="little")
    return _rows(half(d), fifth, _nibbles(codes % 16))


def q4_1(q: Matrix, d: Scales, m: Scales) -> Bytes:
    """20 bytes: d, m, then q as in Q4_0."""
    return _rows(half(d), half(m), _nibbles(q))


def q5_1(q: Matrix, d: Scales, m: Scales) -> Bytes:
    """24 bytes: d, m, then q as in Q5_0."""
    fifth = np.packbits(_runs(q // 16, BLOCK).astype(np.uint8), axis=-1, bitorder="little")
    return _rows(half(d), half(m), fifth, _nibbles(q % 16))


def iq4_nl(q: Matrix, d: Scales) -> Bytes:
    """18 bytes: d, then the places in the table as in Q4_0."""
    return _rows(half(d), _nibbles(q))


def iq4_xs(q: Matrix, a: Eights, d: Scales) -> Bytes:
    """136 bytes: d, the two high bits of a + 32 for every 32 weights in 16 bits, the four low ones, two to a
    byte, then the places in the table as in Q4_0."""
    numbers = _runs(a + 32, 8).astype(np.uint16)
    high = np.bitwise_or.reduce((numbers >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=2)
    low = (numbers[..., ::2] & 15 | (numbers[..., 1::2] & 15) << 4).astype(np.uint8)
    codes = _nibbles(q).reshape(len(q), -1, SUPER // 2)
    return _rows(half(d), high.astype("<u2")[..., None].view(np.uint8), low, codes)


def q2_k(q: Matrix, a: Sixteens, b: Sixteens, d: Scales, e: Scales) -> Bytes:
    """84 bytes: a + 16 b for every 16 weights, q in two bits, d, e."""
    grids = _runs(a, 16).astype(np.uint8) | _runs(b, 16).astype(np.uint8) << 4
    return _rows(grids, _crumbs(q), half(d), half(e))


def q3_k(q: Matrix, a: Sixteens, d: Scales) -> Bytes:
    """110 bytes: the third bit of q + 4, the two lower ones, a + 32 in six bits for every 16 weights, d. The
    four low bits of numbers i and i + 8 share a byte, and the two high ones of i, i + 4, i + 8, i + 12."""
    codes = _runs(q + 4, SUPER).astype(np.uint8)
    third = np.packbits(codes.reshape(*codes.shape[:2], 8, 32) >> 2, axis=2, bitorder="little")[:, :, 0]
    numbers = _runs(a + 32, 16).astype(np.uint8)
    low = numbers[..., :8] & 15 | (numbers[..., 8:] & 15) << 4
    high = (numbers >> 4).reshape(*numbers.shape[:2], 4, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return _rows(third, _crumbs((q + 4) % 4), low, np.bitwise_or.reduce(high, axis=2), half(d))


def q4_k(q: Matrix, a: Eights, b: Eights, d: Scales, e: Scales) -> Bytes:
    """144 bytes: d, e, a and b of every 32 weights, then q, weights i and i + 32 of 64 in a byte."""
    return _rows(half(d), half(e), _sixes(a, b), _halves(q))


def q5_k(q: Matrix, a: Eights, b: Eights, d: Scales, e: Scales) -> Bytes:
    """176 bytes: d, e, a and b, the fifth bits of q, a bit of each byte for 32 weights, the other four."""
    fifth = _runs(q // 16, SUPER).astype(np.uint8)
    fifth = np.packbits(fifth.reshape(*fifth.shape[:2], 8, 32), axis=2, bitorder="little")[:, :, 0]
    return _rows(half(d), half(e), _sixes(a, b), fifth, _halves(q % 16))


def q6_k(q: Matrix, a: Sixteens, d: Scales) -> Bytes:
    """210 bytes: the four low bits of q + 32, its two high ones, a as int8 for every 16 weights, d."""
    codes = _runs(q + 32, SUPER).astype(np.uint8).reshape(len(q), -1, 2, 4, 32)
    low = codes & 15
    low = np.stack([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], axis=3)
    high = (codes >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    scales = a.cpu().numpy().reshape(len(q), -1, 16).astype(np.int8).view(np.uint8)
    shape = codes.shape[:2]
    return _rows(
        low.reshape(*shape, 128), np.bitwise_or.reduce(high, axis=3).reshape(*shape, 64), scales, half(d)
    )


def half(values: Float[Tensor, "out blocks"]) -> np.ndarray:
    """Return fp16 numbers as the two bytes of each, `[out, blocks, 2]`."""
    return np.ascontiguousarray(values.half().cpu().numpy())[..., None].view(np.uint8)


def _runs(q: Matrix, size: int) -> np.ndarray:
    """`[out, blocks, size]`."""
    return q.cpu().numpy().reshape(len(q), -1, size)


def _nibbles(q: Matrix) -> np.ndarray:
    """Codes of 0 ... 15, two to a byte: weight i of a block beside weight i + 16."""
    codes = _runs(q, BLOCK).astype(np.uint8)
    return codes[..., :16] | codes[..., 16:] << 4


def _crumbs(q: Matrix) -> np.ndarray:
    """Codes of 0 ... 3, four to a byte: in each half of a super-block, weights i, i + 32, i + 64, i + 96."""
    codes = _runs(q, SUPER).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:2], 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts, axis=3).reshape(*codes.shape[:2], SUPER // 4)


def _halves(q: Matrix) -> np.ndarray:
    """Codes of 0 ... 15, two to a byte: weight i of 64 beside weight i + 32."""
    codes = _runs(q, SUPER).astype(np.uint8)
    codes = codes.reshape(*codes.shape[:2], 4, 2, 32)
    return (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(*codes.shape[:2], SUPER // 2)


def _sixes(a: Eights, b: Eights) -> np.ndarray:
    """Eight a and eight b of six bits in 12 bytes: the first four of each whole in 4 bytes; the low four bits
    of the last four share a byte, and their high two lie above the first ones."""
    x, y = _runs(a, 8).astype(np.uint8), _runs(b, 8).astype(np.uint8)
    first = [part[..., :4] | (part[..., 4:] >> 4) << 6 for part in (x, y)]
    return np.concatenate([*first, x[..., 4:] & 15 | (y[..., 4:] & 15) << 4], axis=2)


def _rows(*parts: np.ndarray) -> Bytes:
    blocks = np.concatenate(parts, axis=2)
    return blocks.reshape(len(blocks), -1)

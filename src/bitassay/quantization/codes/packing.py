"""Codes to bytes and back, without waste.

`digits` codes in base `base` make one little-endian word of `width` bytes: word = sum_i code_i * base^i.
Powers of two pack as bit fields (3 bits: eight codes to three bytes); ternary packs five codes to a byte,
since 3^5 = 243 < 256. Only the end of a tensor is padded.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How codes lie in bytes: `digits` codes, numbers to `base`, take `width` bytes together."""

    base: int
    digits: int
    width: int

    def packed_bytes(self, count: int) -> int:
        """Return the bytes that `count` codes take."""
        return math.ceil(count / self.digits) * self.width


CHUNK_WORDS = 2**17  # that are made at a time
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes

# By the bits that a code takes: bit fields that fill whole bytes, and ternary.
PACKINGS: dict[float, Packing] = {
    bits: Packing(2**bits, 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)) for bits in range(1, 9)
} | {1.6: Packing(3, 5, 1)}


def pack(codes: Int[Tensor, "..."] | UInt8[Tensor, "..."], bits: float) -> UInt8[Tensor, " bytes"]:
    """Pack codes in [0, base), in row-major order. Raises KeyError for a width that has no packing."""
    packing = PACKINGS[bits]
    flat = codes.reshape(-1).to(torch.uint8)
    if packing.digits == 1:
        return flat.clone()
    return torch.cat([_words(part, packing) for part in flat.split(CHUNK_WORDS * packing.digits)])


def _words(codes: UInt8[Tensor, " codes"], packing: Packing) -> UInt8[Tensor, " bytes"]:
    missing = -codes.numel() % packing.digits
    padded = torch.nn.functional.pad(codes, (0, missing)).view(-1, packing.digits)
    word = torch.zeros(len(padded), dtype=torch.int64, device=codes.device)
    for place in range(packing.digits):
        word += padded[:, place].long() * packing.base**place
    return torch.stack([(word >> (8 * byte)) & 255 for byte in range(packing.width)], 1).byte().reshape(-1)


def unpack(packed: UInt8[Tensor, " bytes"], bits: float, count: int) -> UInt8[Tensor, " count"]:
    """Return the first `count` codes of `packed`: the inverse of `pack`."""
    packing = PACKINGS[bits]
    assert packed.numel() == packing.packed_bytes(count), "packed bytes do not match the number of codes"
    if packing.digits == 1:
        return packed[:count]
    if packing.width == 1:
        return _looked_up(packed.int(), packing.base, packing.digits, 256)[:count]
    parts = packed.view(-1, packing.width).to(torch.int32 if packing.width < 4 else torch.int64)
    word = parts[:, 0]
    for byte in range(1, packing.width):
        word = word | parts[:, byte] << (8 * byte)
    if packing.width == 3:  # by halves, of which there are few enough for a table
        halves = torch.stack((word & 4095, word >> 12), dim=1).view(-1)
        return _looked_up(halves, packing.base, packing.digits // 2, 4096)[:count]
    shift, mask = packing.base.bit_length() - 1, packing.base - 1
    codes = torch.stack([(word >> (shift * place)) & mask for place in range(packing.digits)], dim=1)
    return codes.byte().view(-1)[:count]


def _looked_up(words: Int[Tensor, " words"], base: int, digits: int, values: int) -> UInt8[Tensor, " codes"]:
    """Return the digits of words below `values`, by a table: one number of 2, 4 or 8 bytes holds all digits
    of a word, which is many times faster than a shift (or a division) for each."""
    places = next(size for size in _WIDE if size >= digits)
    powers = base ** torch.arange(digits, device=words.device)
    table = torch.arange(values, device=words.device)[:, None] // powers % base
    table = torch.nn.functional.pad(table.byte(), (0, places - digits)).view(_WIDE[places])
    found = table.view(-1).index_select(0, words).view(torch.uint8)
    return found if places == digits else found.view(-1, places)[:, :digits].reshape(-1)

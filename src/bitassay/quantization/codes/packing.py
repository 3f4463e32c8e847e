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
    base: int
    digits: int
    width: int

    def packed_bytes(self, count: int) -> int:
        """Bytes that `count` codes take."""
        return math.ceil(count / self.digits) * self.width


PACKINGS = {
    8: Packing(256, 1, 1),
    4: Packing(16, 2, 1),
    3: Packing(8, 8, 3),
    2: Packing(4, 4, 1),
    1.6: Packing(3, 5, 1),
    1: Packing(2, 8, 1),
}


def pack(codes: Int[Tensor, "..."] | UInt8[Tensor, "..."], bits: float) -> UInt8[Tensor, " bytes"]:
    """Pack codes in [0, base), in row-major order. Raises KeyError for a width that has no packing."""
    packing = PACKINGS[bits]
    flat = codes.reshape(-1).to(torch.uint8)
    if packing.digits == 1:
        return flat.clone()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % packing.digits)).view(-1, packing.digits)
    word = torch.zeros(len(padded), dtype=torch.int32, device=codes.device)
    for place in range(packing.digits):
        word += padded[:, place].int() * packing.base**place
    bytes_of_word = [(word >> (8 * byte)) & 255 for byte in range(packing.width)]
    return torch.stack(bytes_of_word, dim=1).to(torch.uint8).reshape(-1)


def unpack(packed: UInt8[Tensor, " bytes"], bits: float, count: int) -> UInt8[Tensor, " count"]:
    """The first `count` codes of `packed`: the inverse of `pack`."""
    packing = PACKINGS[bits]
    assert packed.numel() == packing.packed_bytes(count), "packed bytes do not match the number of codes"
    if packing.digits == 1:
        return packed[:count]
    if packing.base == 3:
        return _ternary_digits(packed.device)[packed.int()].view(-1)[:count]
    if packing.width == 1:
        word = packed
    else:
        parts = packed.view(-1, packing.width).int()
        word = sum(
            (parts[:, byte] << (8 * byte) for byte in range(packing.width)), torch.zeros_like(parts[:, 0])
        )
    shift, mask = packing.base.bit_length() - 1, packing.base - 1
    codes = torch.stack([(word >> (shift * place)) & mask for place in range(packing.digits)], dim=1)
    return codes.to(torch.uint8).view(-1)[:count]


def _ternary_digits(device: torch.device) -> UInt8[Tensor, "256 5"]:
    """The five base-3 digits of every byte: looking them up is many times faster than dividing."""
    byte = torch.arange(256, device=device)
    return torch.stack([byte // 3**place % 3 for place in range(5)], dim=1).to(torch.uint8)

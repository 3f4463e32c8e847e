"""Codes of a QuantizedTensor as the blocks of llama.cpp: the same numbers, arranged otherwise.

A block is a run of 32 or 256 weights of a row with an fp16 scale `d` of its own:

    type    run  bits    a weight is             codes
    Q8_0     32  8.5     d q                     -128 ... 127
    Q4_0     32  4.5     d q                     -8 ... 7
    Q4_1     32  5       d q + m, m in fp16      0 ... 15
    TQ2_0   256  2.0625  d q                     -1, 0, 1
    Q2_K    256  2.625   d a q - e b, a and b of 4 bits for every 16 weights    0 ... 3
    Q3_K    256  3.4375  d a q, a of 6 bits for every 16 weights                -4 ... 3

Ours is `s (q - z + o)`, or `s q + m` for binary. It fits exactly where groups are whole numbers of blocks,
the scale is an fp16 number and `q - z + o` a whole one in the range of a type; a K type is used with a = 1,
which takes groups of 256, 512, ... or whole rows. The exact type of the fewest bits is taken. What has up to
16 codes on any other grid becomes Q4_1, whose m, in place of `(o - z) s`, is rounded to fp16. `as_blocks`
is None for the rest: FP8, residual planes, low-rank factors, groups that do not fill blocks.

Source: the layouts of ggml's block types, as the gguf package documents them by decoding them; its decoders
are the oracle of the tests. Left out: finding the scales of K types anew (`llama-quantize` does that), TQ1_0.
"""

from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.shapes import Matrix, PerGroup

BLOCK, SUPER = 32, 256
HELD = ("scheme", "shape", "packed", "scale", "zero_point", "mean")

Bytes = np.ndarray  # [rows, bytes]


class Blocks(NamedTuple):
    """The blocks of a matrix `[rows, bytes]`, and their type in llama.cpp."""

    kind: Kind
    data: Bytes


def as_blocks(tensor: QuantizedTensor) -> Blocks | None:
    """Return `tensor` in llama.cpp's arrangement; None where no type holds its codes."""
    if tensor.format.kind == "float" or tensor.scheme.turned is not None or beside_codes(tensor):
        return None
    grid = tensor.grid
    scale = _per_block(tensor, grid.scale)
    if scale is None or not _fits_half(scale):
        return None
    if grid.mean is not None:
        # With k = (q + 1) / 2 in {0, 1}, s q + m is 2 s k + (m - s).
        low = _per_block(tensor, grid.mean - grid.scale)
        assert low is not None
        return Blocks(Kind.Q4_1, q4_1((tensor.codes() + 1) / 2, 2 * scale, low))
    shift = torch.full_like(grid.scale, grid.offset)
    shift = _per_block(tensor, shift if grid.zero_point is None else shift - grid.zero_point)
    assert shift is not None
    lowest = 0 if not tensor.scheme.symmetric else tensor.format.code_range(symmetric=True)[0]
    return _exact(tensor, scale, shift, lowest) or _nearly_exact(tensor, scale, shift, lowest)


def beside_codes(tensor: QuantizedTensor) -> list[str]:
    """Name what a matrix has that no block holds, such as low-rank factors."""
    others = [field.name for field in fields(tensor) if field.name not in HELD]
    return [name for name in others if getattr(tensor, name) is not None]


def _exact(tensor: QuantizedTensor, scale: Tensor, shift: Tensor, lowest: int) -> Blocks | None:
    """The first type, in the order of their bits, that holds `q - z + o`; its 256 weights share a grid."""
    steps = tensor.codes() + shift.repeat_interleave(BLOCK, 1)
    if (steps != steps.round()).any():
        return None
    low, high = int(steps.min()), int(steps.max())
    if _is_constant(scale) and _is_constant(shift):
        wide, zero = scale[:, :: SUPER // BLOCK], -(shift + lowest)[:, :: SUPER // BLOCK]
        if low >= -1 and high <= 1:
            return Blocks(Kind.TQ2_0, tq2_0(steps, wide))
        if tensor.format.bits == 2 and zero.min() >= 0 and zero.max() <= 15:
            return Blocks(Kind.Q2_K, q2_k(tensor.codes() - lowest, wide, zero))
        if low >= -4 and high <= 3:
            return Blocks(Kind.Q3_K, q3_k(steps, wide))
    if low >= -8 and high <= 7:
        return Blocks(Kind.Q4_0, q4_0(steps, scale))
    if tensor.format.bits > 4 and low >= -128 and high <= 127:
        return Blocks(Kind.Q8_0, q8_0(steps, scale))
    return None


def _nearly_exact(tensor: QuantizedTensor, scale: Tensor, shift: Tensor, lowest: int) -> Blocks | None:
    if tensor.format.bits > 4:
        return None
    return Blocks(Kind.Q4_1, q4_1(tensor.codes() - lowest, scale, scale * (shift + lowest)))


def _per_block(tensor: QuantizedTensor, grid: PerGroup) -> Tensor | None:
    """One number a group as one number a block `[out, in/32]`; None where groups are not whole blocks."""
    rows, columns = tensor.shape
    spans = tensor.granularity.spans(columns)
    if any(size % BLOCK for _, _, size in spans):
        return None
    if tensor.granularity.name == "tensor":
        return grid.expand(rows, columns // BLOCK)
    blocks = [size // BLOCK for start, stop, size in spans for _ in range((stop - start) // size)]
    return grid.repeat_interleave(torch.tensor(blocks, device=grid.device), dim=1)


def _fits_half(scale: Tensor) -> bool:
    """Whether fp16 holds twice the scales with all of its bits, or they are zero."""
    half = torch.finfo(torch.float16)
    return bool(((scale == 0) | ((scale >= half.smallest_normal) & (2 * scale <= half.max))).all())


def _is_constant(blocks: Float[Tensor, "out blocks"]) -> bool:
    """Whether the rows are whole super-blocks, and each has one value."""
    if blocks.shape[1] % (SUPER // BLOCK):
        return False
    groups = blocks.reshape(-1, SUPER // BLOCK)
    return bool((groups == groups[:, :1]).all())


def q8_0(q: Matrix, d: Float[Tensor, "out blocks"]) -> Bytes:
    """34 bytes: d, then the codes as int8."""
    return _rows(_half(d), _runs(q, BLOCK).astype(np.int8).view(np.uint8))


def q4_0(q: Matrix, d: Float[Tensor, "out blocks"]) -> Bytes:
    """18 bytes: d, then q + 8, the first 16 weights in the low half of each byte, the others in the high."""
    return _rows(_half(d), _nibbles(q + 8))


def q4_1(q: Matrix, d: Float[Tensor, "out blocks"], m: Float[Tensor, "out blocks"]) -> Bytes:
    """20 bytes: d, m, then q as in Q4_0."""
    return _rows(_half(d), _half(m), _nibbles(q))


def tq2_0(q: Matrix, d: Float[Tensor, "out supers"]) -> Bytes:
    """66 bytes: q + 1 in two bits, then d."""
    return _rows(_crumbs(q + 1), _half(d))


def q2_k(q: Matrix, d: Float[Tensor, "out supers"], zero: Float[Tensor, "out supers"]) -> Bytes:
    """84 bytes: a + 16 b for every 16 weights, q in two bits, d, e. Here a = 1, b = zero and e = d."""
    grids = np.repeat((1 + 16 * zero.cpu().numpy()).astype(np.uint8)[..., None], SUPER // 16, axis=2)
    return _rows(grids, _crumbs(q), _half(d), _half(d))


def q3_k(q: Matrix, d: Float[Tensor, "out supers"]) -> Bytes:
    """110 bytes: the third bit of q + 4, the two lower ones, a + 32 in six bits for every 16 weights, d. Here
    a = 1: 33 has the low half 1 and the upper bits 2."""
    codes = _runs(q + 4, SUPER).astype(np.uint8)
    high = (codes >> 2).reshape(*codes.shape[:2], 8, 32)
    third = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=2)
    scales = np.array([0x11] * 8 + [0xAA] * 4, dtype=np.uint8)
    return _rows(
        third, _crumbs((q + 4) % 4), np.broadcast_to(scales, (*codes.shape[:2], len(scales))), _half(d)
    )


def _runs(q: Matrix, size: int) -> np.ndarray:
    """`[out, blocks, size]`."""
    return q.cpu().numpy().reshape(len(q), -1, size)


def _half(values: Float[Tensor, "out blocks"]) -> np.ndarray:
    """fp16 numbers as the two bytes of each, `[out, blocks, 2]`."""
    return np.ascontiguousarray(values.half().cpu().numpy())[..., None].view(np.uint8)


def _nibbles(q: Matrix) -> np.ndarray:
    """Codes of 0 ... 15, two to a byte: weight i of a block beside weight i + 16."""
    codes = _runs(q, BLOCK).astype(np.uint8)
    return codes[..., :16] | codes[..., 16:] << 4


def _crumbs(q: Matrix) -> np.ndarray:
    """Codes of 0 ... 3, four to a byte: in each half of a super-block, weights i, i + 32, i + 64, i + 96."""
    codes = _runs(q, SUPER).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:2], 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts, axis=3).reshape(*codes.shape[:2], SUPER // 4)


def _rows(*parts: np.ndarray) -> Bytes:
    blocks = np.concatenate(parts, axis=2)
    return blocks.reshape(len(blocks), -1)

"""Codes of a QuantizedTensor as the blocks of llama.cpp: the same numbers, arranged otherwise.

A block is a run of weights of a row with an fp16 scale `d` of its own, which may be negative:

    type    run  bits    a weight is             codes
    Q1_0    128  1.125   d q                     -1, 1
    TQ1_0   256  1.6875  d q                     -1, 0, 1
    Q2_0     64  2.25    d q                     -1 ... 2, with d < 0 the levels -2 ... 1
    Q2_K    256  2.625   d a q - e b, a and b of 4 bits for every 16 weights    0 ... 3
    Q3_K    256  3.4375  d a q, a of 6 bits for every 16 weights                -4 ... 3
    Q4_K    256  4.5     d a q - e b, a and b of 6 bits for every 32 weights    0 ... 15
    Q5_K    256  5.5     likewise                                               0 ... 31
    Q6_K    256  6.5625  d a q, a of 8 bits for every 16 weights                -32 ... 31
    Q4_0     32  4.5     d q                     -8 ... 7, with d < 0 the levels -7 ... 8
    Q5_0     32  5.5     d q                     -16 ... 15, with d < 0 the levels -15 ... 16
    IQ4_NL   32  4.5     d q                     16 values from -127 to 113
    IQ4_XS  256  4.25    d a q, a of 6 bits for every 32 weights                likewise
    Q4_1     32  5       d q + m, m in fp16      0 ... 15
    Q5_1     32  6       likewise                0 ... 31
    Q8_0     32  8.5     d q                     -128 ... 127

Ours is `s (q - z + o)`, or `s q + m` for binary. It fits exactly where groups are whole numbers of blocks,
the scale is an fp16 number and `q - z + o` a whole one in the range of a type, on either side. The formats
q2_k ... q6_k, iq4_nl and iq4_xs are types with all their numbers; of other schemes a K type has a = 1, which
takes groups of 256, 512, ... or whole rows. The exact type of the fewest bits is taken.
What has up to 16 codes on any other grid becomes Q4_1, whose m, in place of `(o - z) s`, is rounded to fp16.
`as_blocks` is None for the rest: FP8, residual planes, low-rank factors, groups that fill no blocks.

TQ2_0 holds what TQ1_0 does.
"""

from dataclasses import fields
from typing import NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Float
from torch import Tensor

from bitassay.models.gguf_types import Q1_0, Q1_RUN, Q2_0, Q2_RUN
from bitassay.quantization.codes.storage import Stored
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes
from bitassay.quantization.export import gguf_bytes as to_bytes
from bitassay.quantization.export.gguf_bytes import BLOCK, SUPER, Bytes
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Matrix, PerGroup

HELD = ("scheme", "shape", "packed", "scale", "zero_point", "mean", "multiples", "mean_multiples")
PLAIN_BITS = 16.0  # of what no type holds


class Blocks(NamedTuple):
    """The blocks of a matrix `[rows, bytes]`, and their type in llama.cpp."""

    kind: Kind
    data: Bytes


def bits_of(kind: Kind) -> float:
    """Return the bits that a weight takes in a type."""
    run, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    return size_bytes * 8 / run


def as_blocks(tensor: QuantizedTensor, wanted: Kind | None = None) -> Blocks | None:
    """Return `tensor` in llama.cpp's arrangement, as the type `wanted` where one is named; None where no type
    holds its codes, or that one does not."""
    if tensor.format.kind == "float" or tensor.scheme.turned is not None or beside_codes(tensor):
        return None
    if tensor.format.fixed_group is not None:
        return _as_its_type(tensor, wanted)
    grid = tensor.grid
    scale = _per_block(tensor, grid.scale)
    if scale is None or not _fits_half(scale):
        return None
    if grid.mean is not None and tensor.format.kind == "integer":
        minimum = _per_block(tensor, grid.mean)
        assert minimum is not None
        kind, pack = (Kind.Q4_1, to_bytes.q4_1) if tensor.format.bits <= 4 else (Kind.Q5_1, to_bytes.q5_1)
        fits = wanted in (None, kind) and tensor.format.bits <= 5 and tensor.scheme.scale_dtype == "float16"
        return Blocks(kind, pack(tensor.codes(), scale, minimum)) if fits else None
    if grid.mean is not None:
        # With k = (q + 1) / 2 in {0, 1}, s q + m is 2 s k + (m - s).
        low = _per_block(tensor, grid.mean - grid.scale)
        assert low is not None
        return Blocks(Kind.Q4_1, to_bytes.q4_1((tensor.codes() + 1) / 2, 2 * scale, low))
    shift = torch.full_like(grid.scale, grid.offset)
    shift = _per_block(tensor, shift if grid.zero_point is None else shift - grid.zero_point)
    assert shift is not None
    lowest = 0 if not tensor.scheme.symmetric else tensor.format.code_range(symmetric=True)[0]
    if (exact := _exact(tensor, scale, shift, lowest, wanted)) is not None:
        return exact
    return _nearly_exact(tensor, scale, shift, lowest) if wanted in (None, Kind.Q4_1) else None


def beside_codes(tensor: QuantizedTensor) -> list[str]:
    """Name what a matrix has that no block holds, such as low-rank factors."""
    others = [field.name for field in fields(tensor) if field.name not in HELD]
    return [name for name in others if getattr(tensor, name) is not None]


def planned_kind(stored: Stored, columns: int) -> Kind | None:
    """Return the type that a matrix of so many columns will take, at most, by its scheme alone; None where it
    is stored in 16 bits. Codes that do not use all of their range may fit a smaller one."""
    scheme = stored.scheme
    if stored.residual is not None or stored.low_rank is not None or scheme.has_planes:
        return None
    if sizes := Granularity.parse(scheme.granularity).block_sizes:
        scheme = scheme.with_granularity(f"g{sizes[2]}")
    if (run := scheme.number_format.fixed_group) is not None:
        return kind_of(scheme.number_format) if columns % run == 0 else None
    blocks = None if scheme.number_format.kind == "float" else as_blocks(_widest(scheme, columns))
    return None if blocks is None else blocks.kind


def kind_of(fmt: NumberFormat) -> Kind:
    """Return the type that a format of llama.cpp's own is."""
    return Kind[fmt.name.upper()]


def _as_its_type(tensor: QuantizedTensor, wanted: Kind | None) -> Blocks | None:
    kind, q = kind_of(tensor.format), tensor.codes()
    if wanted not in (None, kind) or tensor.shape[1] % (tensor.format.fixed_group or 1):
        return None
    if tensor.format.table is not None:
        values = torch.tensor(tensor.format.table, dtype=torch.float32, device=q.device)
        q = torch.bucketize(q, values).float()
    if tensor.format.levels is None:
        return Blocks(kind, to_bytes.iq4_nl(q, tensor.scale))
    a, d = tensor.scale_multiples(), tensor.scale
    if tensor.mean is None:
        packs = {Kind.Q3_K: to_bytes.q3_k, Kind.Q6_K: to_bytes.q6_k, Kind.IQ4_XS: to_bytes.iq4_xs}
        return Blocks(kind, packs[kind](q, a, d))
    packs = {Kind.Q2_K: to_bytes.q2_k, Kind.Q4_K: to_bytes.q4_k, Kind.Q5_K: to_bytes.q5_k}
    return Blocks(kind, packs[kind](q, a, tensor.mean_multiples_of_groups(), d, tensor.mean))


def _widest(scheme: WeightScheme, columns: int) -> QuantizedTensor:
    """A matrix of two rows that uses all codes and the outermost zero points of a scheme."""
    fmt, groups = scheme.number_format, Granularity.parse(scheme.granularity).scale_shape(2, columns)
    low, high = fmt.code_range(scheme.symmetric)
    every = torch.tensor([-1.0, 1.0]) if fmt.kind == "binary" else torch.arange(low, high + 1.0)
    codes = every[torch.arange(2 * columns) % len(every)].view(2, columns)
    scale = (
        0.125 + torch.arange(groups[0] * groups[1]).view(groups) % 64 / 1024
    )  # as different as they may be
    zero = None
    half = 2 ** (int(fmt.bits) - 1)
    if not scheme.symmetric and fmt.kind == "integer" and scheme.zero_point != "minimum":
        ends = {"mirrored": (half - 1, half), "middle": (half - 2 / 3, half - 1 / 3)}
        first, last = ends.get(scheme.zero_point, (0, high) if scheme.whole_zero_points else (0.3, 0.7))
        zero = torch.full(groups, float(first))
        zero[-1] = float(last)
    minimum = scheme.zero_point == "minimum"
    has_mean = (fmt.kind == "binary" or minimum) and not scheme.symmetric
    mean = torch.full(groups, 0.03) if has_mean else None
    return from_codes(codes, scale, scheme, zero_point=zero, mean=mean)


def _exact(
    tensor: QuantizedTensor, scale: Tensor, shift: Tensor, lowest: int, wanted: Kind | None
) -> Blocks | None:
    """The first type, in the order of their bits, that holds `q - z + o`; or `wanted`, if it does."""

    def may_be(kind: Kind) -> bool:
        return wanted in (None, kind)

    steps = tensor.codes() + shift.repeat_interleave(BLOCK, 1)
    if (steps != steps.round()).any():
        return None
    low, high = int(steps.min()), int(steps.max())
    binary, shared = tensor.format.kind == "binary", _Shared(scale, shift)
    if binary and may_be(Q1_0) and (d := shared.by(Q1_RUN)) is not None:
        return Blocks(Q1_0, to_bytes.q1_0((steps + 1) / 2, d))
    if low >= -1 and high <= 1 and (d := shared.by(SUPER)) is not None:
        if wanted == Kind.TQ2_0:
            return Blocks(wanted, to_bytes.tq2_0(steps, d))
        if may_be(Kind.TQ1_0):
            return Blocks(Kind.TQ1_0, to_bytes.tq1_0(steps, d))
    if (
        may_be(Q2_0)
        and (d := shared.by(Q2_RUN)) is not None
        and (signed := _signed(steps, d, -1, 2)) is not None
    ):
        return Blocks(Q2_0, to_bytes.q2_0(*signed))
    if (d := shared.by(SUPER)) is not None:
        zero = -(shift + lowest)[:, :: SUPER // BLOCK]
        if may_be(Kind.Q2_K) and tensor.format.bits == 2 and zero.min() >= 0 and zero.max() <= 15:
            ones, zeros = (part.repeat_interleave(SUPER // 16, 1) for part in (torch.ones_like(d), zero))
            return Blocks(Kind.Q2_K, to_bytes.q2_k(tensor.codes() - lowest, ones, zeros, d, d))
        if may_be(Kind.Q3_K) and low >= -4 and high <= 3:
            ones = torch.ones_like(d).repeat_interleave(SUPER // 16, 1)
            return Blocks(Kind.Q3_K, to_bytes.q3_k(steps, ones, d))
    if may_be(Kind.Q4_0) and (signed := _signed(steps, scale, -8, 7)) is not None:
        return Blocks(Kind.Q4_0, to_bytes.q4_0(*signed))
    if (
        may_be(Kind.Q5_0)
        and tensor.format.bits > 4
        and (signed := _signed(steps, scale, -16, 15)) is not None
    ):
        return Blocks(Kind.Q5_0, to_bytes.q5_0(*signed))
    if may_be(Kind.Q8_0) and tensor.format.bits > 4 and low >= -128 and high <= 127:
        return Blocks(Kind.Q8_0, to_bytes.q8_0(steps, scale))
    return None


class _Shared(NamedTuple):
    """One scale and one shift for every 32 weights."""

    scale: Float[Tensor, "out blocks"]
    shift: Float[Tensor, "out blocks"]

    def by(self, run: int) -> Tensor | None:
        """The scales of runs of so many weights; None where a run has several, or rows are no whole runs."""
        several = run // BLOCK
        if not (_is_constant(self.scale, several) and _is_constant(self.shift, several)):
            return None
        return self.scale[:, ::several]


def _signed(
    steps: Matrix, d: Float[Tensor, "out blocks"], low: int, high: int
) -> tuple[Tensor, Tensor] | None:
    """Return codes in `low ... high` and scales of either sign for the same products; None where a block uses
    both ends."""
    runs = steps.reshape(*d.shape, -1)
    least, most = runs.amin(2), runs.amax(2)
    forwards, backwards = (least >= low) & (most <= high), (least >= -high) & (most <= -low)
    if not (forwards | backwards).all():
        return None
    sign = torch.where(forwards, 1.0, -1.0)
    return (runs * sign[..., None]).reshape(steps.shape), d * sign


def _nearly_exact(tensor: QuantizedTensor, scale: Tensor, shift: Tensor, lowest: int) -> Blocks | None:
    if tensor.format.bits > 4:
        return None
    return Blocks(Kind.Q4_1, to_bytes.q4_1(tensor.codes() - lowest, scale, scale * (shift + lowest)))


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
    """Whether fp16 holds twice the scales, and each of them with all of its bits or, where it is smaller than
    fp16's normal numbers, as it is."""
    half = torch.finfo(torch.float16)
    small = scale == scale.half().float()
    return bool(((small | (scale >= half.smallest_normal)) & (2 * scale <= half.max)).all())


def _is_constant(blocks: Float[Tensor, "out blocks"], several: int) -> bool:
    """Whether the rows are whole runs of so many blocks, and each has one value."""
    if blocks.shape[1] % several:
        return False
    groups = blocks.reshape(-1, several)
    return bool((groups == groups[:, :1]).all())

"""Products with packed weights: where torch has a kernel that reads the codes themselves.

Decoding one token at a time is bound by the bytes of weights that are read; many rows at once are bound by
arithmetic, and there dequantizing first is faster: `QuantizedLinear` chooses by MAX_ROWS. On a CPU with bf16
input:

    int8 codes, one scale a row              _weight_int8pack_mm          8 bits read a weight
    codes of at most 4 bits, equal groups    _weight_int4pack_mm_for_cpu  4 bits read, whatever was stored

Residual planes and merged copies are a product each, and the sum of these. Results differ from the
dequantized product by bf16 rounding (`tests/quantization/test_kernels.py` bounds it); in fp32 there is no
kernel and no difference.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import BFloat16
from torch import Tensor

from bitassay.quantization.codes.tensor import QuantizedTensor

# At more rows dequantizing takes less: measured without AMX, where torch's bf16 products are several times
# slower than with it (benchmarks/packed_prefill.py).
MAX_ROWS = 32 if torch.cpu._is_amx_tile_supported() else 256
# With other sizes torch 2.13's kernel reads past the end of rows (168: a segmentation fault).
INT8_COLUMNS = 32
INT4_GROUPS = (32, 64, 128, 256)

Product = Callable[[BFloat16[Tensor, "rows in"]], BFloat16[Tensor, "rows out"]]


def packed_product(quantized: QuantizedTensor) -> Product | None:
    """Return `x -> x W'^T` on the codes for bf16 `x`; None where torch has no such kernel."""
    further = (quantized.residual_columns, quantized.column_scale, quantized.low_rank)
    if quantized.packed.device.type != "cpu" or any(part is not None for part in further):
        return None
    if quantized.residual is not None:
        plane, rest = packed_product(replace(quantized, residual=None)), packed_product(quantized.residual)
        if plane is None or rest is None:
            return None
        return lambda x: (plane(x).float() + rest(x)).to(torch.bfloat16)
    (rows, columns), scheme = quantized.shape, quantized.scheme
    if scheme.turned is not None:
        return None
    if (scheme.format, scheme.symmetric, scheme.granularity) == ("int8", True, "channel"):
        return _int8_product(quantized) if columns % INT8_COLUMNS == 0 else None
    group_size = quantized.granularity.group_size
    integer = quantized.format.kind not in ("float", "table") and quantized.format.bits <= 4
    if integer and group_size in INT4_GROUPS and columns % group_size == 0 and rows % 16 == 0:
        return _int4_product(quantized, group_size)
    return None


def _int8_product(quantized: QuantizedTensor) -> Product:
    codes = quantized.codes().to(torch.int8)
    scale = quantized.scale[:, 0].float()
    ones = torch.ones(len(scale), dtype=torch.bfloat16)
    # The kernel takes scales in bf16; kept out of it, they keep their precision.
    return lambda x: (torch.ops.aten._weight_int8pack_mm(x, codes, ones).float() * scale).to(torch.bfloat16)


def _int4_product(quantized: QuantizedTensor, group_size: int) -> Product:
    """The kernel computes `(q - 8) * s + m` with q in 0..15; every format of at most 16 levels can be written
    so. Where `q - z` fits into -8..7 it is what the kernel gets, so that m is 0 but for an offset or the rest
    of a free zero point; only 4-bit codes with zero points, and free ones far from 0, need a larger m, in
    bf16."""
    codes, grid = quantized.codes(), quantized.grid
    rest = torch.full_like(grid.scale, grid.offset)
    if grid.zero_point is not None:
        _, qmax = quantized.format.code_range(symmetric=False)
        centre = grid.zero_point.round().clamp(qmax - 7, 8)  # q - z in -8..7
        codes = codes - centre.repeat_interleave(group_size, dim=1)
        rest = rest + centre - grid.zero_point
    elif quantized.format.kind == "integer" and grid.mean is not None:  # q in 0..2^b-1
        middle = 2 ** (int(quantized.format.bits) - 1)
        codes, rest = codes - middle, rest + middle
    shift = rest * grid.scale + (0 if grid.mean is None else grid.mean)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    grids = torch.stack((grid.scale, shift), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, grids)

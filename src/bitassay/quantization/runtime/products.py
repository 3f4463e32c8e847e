"""Products of two sides in codes: rounded inputs times quantized weights, as the hardware multiplies them.

    integers    y = s_x s_w (q_x q_w^T - z_x sum q_w) + x_O W'_O^T     `torch._int_mm`, CPU and GPU
    FP8         y = s_x s_w (q_x q_w^T)              + x_O W'_O^T     `torch._scaled_mm`, GPU, bf16 out

O are the outlier columns, whose codes are zero. Integer products are summed exactly in int32 (128 * 128 * in
< 2^31 for any layer there is) and scaled in fp32. Both need one scale for an output row, so the weights'
granularity is channel or tensor, and no zero points, mean, residual or factors beside the codes; codes of
fewer than 8 bits go as int8.

Otherwise `rounded_product` returns None and the linear multiplies what the codes stand for. An FP8 product on
a CPU is many times slower than that, so there it is never taken. Sizes are padded with zeros: on a GPU
`_int_mm` wants more than 16 rows, and columns in multiples of 8; on a CPU torch 2.13's is wrong for a single
column (`tests/quantization/test_products.py`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding, input_codes, undefined

MULTIPLE = 16  # what both products want of rows and columns of the weights
GPU_ROWS = 32

RoundedProduct = Callable[[Float[Tensor, "tokens in"]], Float[Tensor, "tokens out"]]


def product_kind(
    quantized: QuantizedTensor, inputs: InputRounding, dtype: torch.dtype
) -> Literal["int8", "fp8"] | None:
    """Return which product the two schemes have on this device; None where they have none."""
    if quantized.granularity.name not in ("channel", "tensor") or inputs.copies > 1:
        return None
    # Zero points, a mean, an offset, a second plane: whatever stands beside codes and scales shows here.
    if not torch.equal(quantized.codes() * quantized.scale.float(), quantized.dequantize()):
        return None
    weight_float, input_float = quantized.format.float_dtype, inputs.number_format.float_dtype
    if weight_float is None and input_float is None:
        return "int8" if inputs.number_format.bits <= 8 else None
    # cuBLASLt has no product of two e5m2 matrices, and none of FP8 and integers.
    fp8 = weight_float and input_float and torch.float8_e4m3fn in (weight_float, input_float)
    return "fp8" if fp8 and quantized.packed.is_cuda and dtype == torch.bfloat16 else None


def rounded_product(
    quantized: QuantizedTensor, inputs: InputRounding, dtype: torch.dtype
) -> RoundedProduct | None:
    """Return `x -> x' W'^T`, in `dtype`; None where there is no product of codes."""
    kind = product_kind(quantized, inputs, dtype)
    if kind is None:
        return None
    return int8_product(quantized, inputs, dtype) if kind == "int8" else fp8_product(quantized, inputs)


def int8_product(quantized: QuantizedTensor, inputs: InputRounding, dtype: torch.dtype) -> RoundedProduct:
    """Return the product of integer codes of at most 8 bits on both sides."""
    (rows, columns), codes = quantized.shape, quantized.codes()
    weight = padded(codes.to(torch.int8), MULTIPLE)
    scale = quantized.scale.float().reshape(-1)
    sums = codes.sum(1).int()
    rest = _outlier_product(quantized, inputs, dtype)
    # Asymmetric codes are 0..2^b - 1: shifted by half of that, both they and their zero points fit in int8.
    shift = 0 if inputs.symmetric else 2 ** (int(inputs.number_format.bits) - 1)
    least_rows = GPU_ROWS if quantized.packed.is_cuda else 1

    def product(x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        q, grid = input_codes(x, inputs)
        q = (q - shift).to(torch.int8)
        q = pad(q, (0, weight.shape[1] - columns, 0, max(0, least_rows - len(q))))
        total: Int[Tensor, "tokens out"] = torch.ops.aten._int_mm(q, weight.t())[: len(x), :rows]
        if grid.zero_point is not None:
            total = total - (grid.zero_point - shift).int() * sums
        y = total.float() * grid.scale * scale + undefined(x)
        return (y if rest is None else y + rest(x)).to(dtype)

    return product


def fp8_product(quantized: QuantizedTensor, inputs: InputRounding) -> RoundedProduct:
    """Return the product of FP8 codes on both sides, with a scale for each token and output row; in bf16."""
    rows, columns = quantized.shape
    assert quantized.format.float_dtype is not None
    input_dtype = inputs.number_format.float_dtype
    weight = padded(quantized.codes(), MULTIPLE).to(quantized.format.float_dtype)
    scale = quantized.scale.float().reshape(1, -1).expand(1, rows)
    scale = pad(scale, (0, len(weight) - rows), value=1.0).contiguous()
    rest = _outlier_product(quantized, inputs, torch.bfloat16)

    def product(x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        q, grid = input_codes(x, inputs)
        q = pad(q, (0, weight.shape[1] - columns)).to(input_dtype)
        input_scale = grid.scale.expand(len(x), 1).contiguous()
        y = torch.ops.aten._scaled_mm(q, weight.t(), input_scale, scale, out_dtype=torch.bfloat16)
        y = y[:, :rows].float() + undefined(x)
        return (y if rest is None else y + rest(x)).bfloat16()

    return product


def _outlier_product(
    quantized: QuantizedTensor, inputs: InputRounding, dtype: torch.dtype
) -> RoundedProduct | None:
    """Return what the outlier columns add, in fp32 on values that the model's dtype holds."""
    if not inputs.outliers:
        return None
    columns = torch.tensor(inputs.outliers, device=quantized.packed.device)
    weight = quantized.dequantize()[:, columns].to(dtype).float()
    return lambda x: linear(x[:, columns].float(), weight)


def padded(matrix: Tensor, multiple: int) -> Tensor:
    """Return the matrix with zeros below and to the right, up to multiples."""
    rows, columns = matrix.shape
    return pad(matrix, (0, -columns % multiple, 0, -rows % multiple))

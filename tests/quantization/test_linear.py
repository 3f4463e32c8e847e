"""The real model's linear: dense arithmetic on dequantized weights, or the kernel for a few rows of bf16."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.recipe.recipe import WeightScheme
from bitassay.quantization.runtime.kernels import MAX_ROWS
from bitassay.quantization.runtime.linear import QuantizedLinear

W4 = WeightScheme(format="int4", granularity="g64", symmetric=False)


def layer(dtype: torch.dtype, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    quantized = quantize_tensor(torch.randn(48, 128, generator=generator) * 0.1, W4)
    return QuantizedLinear(quantized, torch.full((48,), 3.0, dtype=dtype) if bias else None, dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
def test_fp32_is_the_dense_product_to_the_bit(rows, bias):
    made, x = layer(torch.float32, bias), inputs(rows, 128)
    assert made.product is None
    assert torch.equal(made(x), linear(x, made.quantized.dequantize(), made.bias))


def test_the_kernel_takes_up_to_max_rows():
    made, several = layer(torch.bfloat16), inputs(MAX_ROWS, 128, dtype=torch.bfloat16)
    assert made.product is not None
    assert torch.equal(made(several), made.product(several) + made.bias)
    assert not torch.equal(made(several), linear(several, made.weight, made.bias))
    many = inputs(MAX_ROWS + 1, 128, dtype=torch.bfloat16)
    assert torch.equal(made(many), linear(many, made.weight, made.bias))


def test_rounded_inputs_without_a_product_of_codes_take_the_kernel_too():
    weight, x = layer(torch.bfloat16).quantized, inputs(MAX_ROWS, 128, dtype=torch.bfloat16)
    made = QuantizedLinear(weight, None, torch.bfloat16, InputRounding("int8"))
    assert made.rounded_product is None
    rounded = rounded_inputs(x, made.inputs)
    assert torch.equal(made(x), made.product(rounded))
    assert not torch.equal(rounded, x)
    many = inputs(MAX_ROWS + 1, 128, dtype=torch.bfloat16)
    assert torch.equal(made(many), linear(rounded_inputs(many, made.inputs), made.weight))


def test_rows_are_counted_over_all_leading_dimensions():
    made, x = layer(torch.bfloat16), inputs(2, MAX_ROWS // 2 + 1, 128, dtype=torch.bfloat16)
    assert torch.equal(made(x), linear(x, made.weight, made.bias))
    few = inputs(2, 3, 128, dtype=torch.bfloat16)
    assert torch.equal(made(few), made(few.view(6, 128)).view(2, 3, 48))


@pytest.mark.sample(4)
@pytest.mark.parametrize("view", [
    lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[:1].expand(4, 6, 128), lambda x: x[0, 0], lambda x: x[:, :0],
], ids=["strided", "transposed", "expanded", "vector", "empty"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_view_is_taken_as_its_values(view, dtype):
    made, x = layer(dtype), view(inputs(4, 6, 128, dtype=dtype))
    assert made(x).shape == (*x.shape[:-1], 48)
    torch.testing.assert_close(made(x), made(x.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0)
    torch.testing.assert_close(made(x), linear(x, made.weight, made.bias), rtol=0.02, atol=0.02)


def test_the_dtype_is_followed_and_the_codes_stay():
    made = layer(torch.float32)
    packed, scale = made.quantized.packed, made.quantized.scale
    assert made.product is None
    made.to(torch.bfloat16)
    assert made.weight.dtype == made.bias.dtype == made.dtype == torch.bfloat16
    assert made.product is not None
    assert torch.equal(made.quantized.packed, packed)
    assert torch.equal(made.quantized.scale, scale)
    assert made.quantized.scale.dtype == torch.float16
    made.float()
    assert made.product is None
    assert torch.equal(made.weight, layer(torch.float32).weight)


def test_a_layer_that_moved_forgets_its_kernel():
    made = layer(torch.bfloat16)
    assert made.product is not None
    made.to("meta")
    assert made.quantized.packed.device.type == "meta"
    assert made.product is None


def test_a_copy_computes_the_same():
    made, x = layer(torch.bfloat16), inputs(3, 128, dtype=torch.bfloat16)
    made(x)
    assert torch.equal(copy.deepcopy(made)(x), made(x))


def test_it_says_what_it_is():
    assert "in=128, out=48, int4 g64" in repr(layer(torch.float32))

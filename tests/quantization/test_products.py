"""Products of codes: what the fake model computes, but for the order of fp32 sums, at every shape."""

import itertools

import pytest
import torch

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import LowRank, QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding, input_codes, rounded_inputs
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.products import fp8_product, int8_product, product_kind

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROWS = (0, 1, 7, 16, 17, 33)
SHAPES = [(1, 1), (8, 1), (1, 5), (5, 7), (16, 16), (24, 31), (48, 168), (7, 300)]
ROUNDINGS = {
    "dynamic": InputRounding("int8"),
    "asymmetric": InputRounding("int8", symmetric=False),
    "int6": InputRounding("int6", symmetric=False),
    "int4": InputRounding("int4"),
    "static": InputRounding("int8", scale=0.02),
    "static-asymmetric": InputRounding("int8", symmetric=False, scale=0.015, zero_point=201),
}


def made(out: int, columns: int, seed: int = 0, **scheme) -> QuantizedTensor:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    return quantize_tensor(weight, WeightScheme.model_validate({"format": "int8"} | scheme))


def inputs(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_int8_is_the_sum_of_products_of_codes(rounding):
    for (out, columns), rows in itertools.product(SHAPES, ROWS):
        weight, x = made(out, columns), inputs(rows, columns)
        y = int8_product(weight, rounding, torch.float32)(x)
        codes, grid = input_codes(x, rounding)
        zero = 0 if grid.zero_point is None else grid.zero_point
        sums = ((codes - zero).long() @ weight.codes().long().T).double()
        exact = sums * grid.scale.double() * weight.scale.double().T
        assert y.shape == (rows, out)
        # Three fp32 roundings, and the int32 sum exact.
        assert ((y.double() - exact).abs() <= 2**-22 * exact.abs()).all(), (out, columns, rows)


@pytest.mark.sample(10)
@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("outliers", [(), (0, 5, 30)], ids=["", "outliers"])
@pytest.mark.parametrize(
    "scheme", [{}, {"granularity": "tensor"}, {"format": "int4"}, {"format": "ternary"}, {"format": "binary"}]
)
def test_int8_agrees_with_the_fake_product(rounding, outliers, scheme):
    weight, x = made(24, 31, **scheme), inputs(9, 31)
    rounding = InputRounding(**{**vars(rounding), "outliers": outliers})
    assert product_kind(weight, rounding, torch.float32) == "int8"
    y = int8_product(weight, rounding, torch.float32)(x)
    fake = rounded_inputs(x, rounding) @ weight.dequantize().T
    # The bound of an fp32 sum of n terms: n * 2^-24 of the sum of magnitudes.
    bound = 40 * 2**-24 * (rounded_inputs(x, rounding).abs() @ weight.dequantize().abs().T)
    assert ((y - fake).abs() <= bound).all()


def test_outlier_columns_keep_all_their_bits():
    weight, x = made(8, 20), inputs(5, 20)
    x[:, 3] *= 1000
    exact = x @ weight.dequantize().T
    plain = int8_product(weight, InputRounding("int8"), torch.float32)(x)
    split = int8_product(weight, InputRounding("int8", outliers=(3,)), torch.float32)(x)
    assert (split - exact).norm() < 0.01 * (plain - exact).norm()


@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_codes_do_not_overflow(value):
    columns = 40000
    weight = made(8, columns)
    weight = QuantizedTensor(
        weight.scheme, weight.shape, torch.full_like(weight.packed, value + 128), torch.ones(8, 1).half()
    )
    x = torch.full((2, columns), -128.0)
    y = int8_product(weight, InputRounding("int8", scale=1.0), torch.float32)(x)
    assert torch.equal(y, torch.full((2, 8), -128.0 * value * columns))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("outliers", [(), (2,)])
@pytest.mark.parametrize("scale", [None, 0.02])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(bad, outliers, scale):
    weight, x = made(6, 10), inputs(3, 10)
    rounding = InputRounding("int8", scale=scale, outliers=outliers)
    fine = int8_product(weight, rounding, torch.float32)(x)
    x[1, 2] = bad
    y = int8_product(weight, rounding, torch.float32)(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], fine[[0, 2]])
    assert rounded_inputs(x, rounding)[1].isnan().any()


def test_a_token_of_zeros_gives_zeros():
    for rounding in ROUNDINGS.values():
        assert not int8_product(made(6, 10), rounding, torch.float32)(torch.zeros(2, 10)).any()


def test_a_tokens_result_does_not_depend_on_its_neighbours():
    weight, x = made(48, 96), inputs(40, 96)
    for rounding in ROUNDINGS.values():
        product = int8_product(weight, rounding, torch.float32)
        together = product(x)
        for row in (0, 17, 39):
            assert torch.equal(product(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [
        ({"granularity": "g32"}, InputRounding("int8")),
        ({"symmetric": False}, InputRounding("int8")),
        ({"format": "binary", "symmetric": False}, InputRounding("int8")),
        ({"format": "fp8_e4m3"}, InputRounding("int8")),
        ({}, InputRounding("fp8_e4m3")),
        ({}, InputRounding("int16")),
        ({"format": "fp8_e4m3"}, InputRounding("fp8_e4m3")),  # there is one, but not on a CPU
    ],
)
def test_what_has_no_product_is_dequantized_and_says_so(scheme, rounding):
    weight, x = made(24, 64, **scheme), inputs(4, 64)
    assert product_kind(weight, rounding, torch.bfloat16) is None
    layer = QuantizedLinear(weight, None, torch.float32, rounding)
    assert torch.equal(layer(x), rounded_inputs(x, rounding) @ weight.dequantize().T)
    assert "inputs dequantized" in repr(layer)
    assert "fake" not in repr(QuantizedLinear(made(24, 64), None, torch.float32, InputRounding("int8")))


def test_factors_beside_the_codes_have_no_product():
    weight = made(24, 64)
    beside = LowRank(torch.ones(24, 1).half(), torch.ones(1, 64).half())
    more = QuantizedTensor(weight.scheme, weight.shape, weight.packed, weight.scale, low_rank=beside)
    assert product_kind(more, InputRounding("int8"), torch.float32) is None


@pytest.mark.parametrize("formats", [("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "fp8_e5m2")])
@pytest.mark.parametrize("outliers", [(), (0, 9)])
def test_fp8_agrees_with_the_fake_product(formats, outliers):
    for (out, columns), rows in itertools.product([(16, 32), (24, 31), (7, 100)], (1, 5, 18)):
        weight, x = made(out, columns, format=formats[0]), inputs(rows, columns).bfloat16()
        rounding = InputRounding(formats[1], outliers=outliers)
        y = fp8_product(weight, rounding)(x)
        exact = rounded_inputs(x.float(), rounding) @ weight.dequantize().T
        assert y.shape == exact.shape
        # The result, and the weights of outlier columns, are rounded to bf16.
        assert (y.float() - exact).norm() < 2**-8 * exact.norm()


def test_a_layer_adds_its_bias_and_keeps_leading_dimensions():
    weight, x = made(24, 31), inputs(6, 31)
    bias = torch.linspace(-1, 1, 24)
    layer = QuantizedLinear(weight, bias, torch.float32, InputRounding("int8"))
    plain = int8_product(weight, InputRounding("int8"), torch.float32)(x)
    assert torch.equal(layer(x.view(2, 3, 31)), (plain + bias).view(2, 3, 24))
    assert torch.equal(layer(x.t().contiguous().t()), plain + bias)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_int8_on_a_gpu_is_what_a_cpu_computes(rounding):
    for (out, columns), rows in itertools.product(SHAPES, ROWS):
        weight, x = made(out, columns), inputs(rows, columns)
        here = int8_product(weight, rounding, torch.float32)(x)
        there = int8_product(weight.to("cuda"), rounding, torch.float32)(x.cuda())
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=0)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("formats", [("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "fp8_e5m2")])
def test_fp8_on_a_gpu_agrees_with_the_fake_product(formats):
    for (out, columns), rows in itertools.product([(16, 32), (24, 31), (256, 512)], (1, 5, 18)):
        weight, x = made(out, columns, format=formats[0]).to("cuda"), inputs(rows, columns).bfloat16().cuda()
        rounding = InputRounding(formats[1], outliers=(0, 9))
        assert product_kind(weight, rounding, torch.bfloat16) == "fp8"
        exact = rounded_inputs(x.float(), rounding) @ weight.dequantize().T
        assert (fp8_product(weight, rounding)(x).float() - exact).norm() < 2**-8 * exact.norm()

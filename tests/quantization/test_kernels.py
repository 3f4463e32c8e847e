"""Products with packed weights are as exact as a dense bf16 product, and are there for the schemes that they know only."""

from dataclasses import replace

import pytest
import torch

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import LowRank
from bitassay.quantization.recipe.recipe import WeightScheme
from bitassay.quantization.runtime.kernels import MAX_ROWS, packed_product

GROUPED = [
    {"format": name, "symmetric": symmetric}
    for name in ("int4", "int3", "int2", "binary")
    for symmetric in (True, False)
]
KERNELS = [
    {"format": "int8"},
    {"format": "int8", "scale_dtype": "float32"},
    *(
        scheme | {"granularity": size}
        for scheme in (*GROUPED, {"format": "ternary"})
        for size in ("g32", "g64")
    ),
    {"format": "int4", "granularity": "g64", "symmetric": False, "scale": "mse", "scale_dtype": "bfloat16"},
    {"format": "int4", "granularity": "g128"},
    {"format": "int4", "granularity": "g64", "symmetric": False, "zero_point": "free"},
    {"format": "int3", "granularity": "g64", "symmetric": False, "zero_point": "free"},
    {"format": "int2", "granularity": "g64", "offset": 0.5},
    {"format": "int2", "granularity": "g64", "symmetric": False, "zero_point": "middle"},
    {"format": "int3", "granularity": "g64", "symmetric": False, "offset": 0.5},
    {"format": "int2", "granularity": "g256", "symmetric": False},
]


def label(scheme: dict) -> str:
    return "-".join(str(value) for value in scheme.values())


@pytest.mark.sample(12)
@pytest.mark.parametrize("scheme", KERNELS, ids=label)
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
def test_kernels_are_as_exact_as_a_bf16_product(scheme, rows):
    generator = torch.Generator().manual_seed(rows)
    done = quantize_tensor(torch.randn(48, 256, generator=generator) * 0.1 + 0.01, WeightScheme(**scheme))
    x = torch.randn(rows, 256, generator=generator).bfloat16()
    product = packed_product(done)
    assert product is not None
    exact = x.double() @ done.dequantize().double().T
    dense = x @ done.dequantize().bfloat16().T
    error, dense_error = ((y.double() - exact).norm() / exact.norm() for y in (product(x), dense))
    # Two sources of bf16 rounding in quadrature (scale and offset, or weight; and the output), of 2^-9 each at most.
    assert error < max(1.5 * dense_error, 0.004)


@pytest.mark.parametrize(("scheme", "shape"), [
    ({"format": "int8", "granularity": "g64"}, (48, 192)), ({"format": "int8", "symmetric": False}, (48, 192)), ({"format": "fp8_e4m3"}, (48, 192)),
    ({"format": "fp8_e4m3", "granularity": "g64"}, (48, 192)), ({"format": "int8", "granularity": "tensor"}, (48, 192)), ({"format": "int4"}, (48, 192)),
    ({"format": "int4", "granularity": "tensor"}, (48, 192)), ({"format": "int4", "granularity": "g96"}, (48, 192)),
    ({"format": "int4", "granularity": "g128"}, (48, 192)), ({"format": "int4", "granularity": "g64"}, (40, 192)), ({"format": "int8"}, (48, 168)),
])  # fmt: skip
def test_what_no_kernel_computes_has_none(scheme, shape):
    assert packed_product(quantize_tensor(torch.randn(shape), WeightScheme(**scheme))) is None


def test_free_zero_points_far_from_zero_have_a_kernel_too():
    w = torch.rand(48, 64, generator=torch.Generator().manual_seed(0)) * 0.1 + 5
    for name in ("int4", "int3", "int2"):
        scheme = WeightScheme(format=name, granularity="g64", symmetric=False, zero_point="free")
        done = quantize_tensor(w, scheme)
        assert done.zero_points().max() < -100
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        product, exact = packed_product(done), x.double() @ done.dequantize().double().T
        assert (product(x).double() - exact).norm() / exact.norm() < 0.004


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("format", ["int2", "binary"])
def test_planes_are_a_product_each(format, count):
    copies = {"count": count, "differ": "residual"}
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    done = quantize_tensor(w, WeightScheme(format=format, granularity="g64", copies=copies))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    product, exact = packed_product(done), x.double() @ done.dequantize().double().T
    assert (product(x).double() - exact).norm() / exact.norm() < 0.004


def test_what_is_more_than_codes_has_no_kernel():
    done = quantize_tensor(torch.randn(48, 192), WeightScheme(format="int8"))
    factors = LowRank(torch.zeros(48, 1).half(), torch.zeros(1, 192).half())
    without = quantize_tensor(torch.randn(48, 192), WeightScheme(format="int4"))
    assert packed_product(replace(done, residual=without)) is None
    columns = quantize_tensor(torch.randn(48, 192), WeightScheme(format="binary", residual=0.1))
    assert columns.residual_columns is not None
    assert packed_product(columns) is None
    assert packed_product(replace(done, low_rank=factors)) is None


def test_there_is_no_kernel_off_the_cpu():
    done = quantize_tensor(torch.randn(48, 192), WeightScheme(format="int8"))
    assert packed_product(done) is not None
    assert packed_product(done.to("meta")) is None

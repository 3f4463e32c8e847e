"""Our blocks, decoded by the gguf package, are our weights."""

from dataclasses import replace

import pytest
import torch
from gguf import dequantize

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.storage import description
from bitassay.quantization.codes.tensor import LowRank, from_codes
from bitassay.quantization.export.gguf_blocks import as_blocks, bits_of, planned_kind
from bitassay.quantization.recipe.weights import WeightScheme


def matrix(columns=512):
    return torch.randn(24, columns, generator=torch.Generator().manual_seed(0)) / 20


def decoded(blocks):
    return torch.from_numpy(dequantize(blocks.data, blocks.kind).copy())


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ({"format": "int8", "granularity": "g32"}, "Q8_0"),
        ({"format": "int8", "granularity": "channel"}, "Q8_0"),
        ({"format": "int4", "granularity": "g32"}, "Q4_0"),
        ({"format": "int4", "granularity": "g128"}, "Q4_0"),
        ({"format": "int4", "granularity": "tensor"}, "Q4_0"),
        ({"format": "int4", "granularity": "g160"}, "Q4_0"),  # and a last group of 32
        ({"format": "int3", "granularity": "g64"}, "Q4_0"),
        ({"format": "int3", "granularity": "g64", "symmetric": False}, "Q4_0"),
        ({"format": "int4", "granularity": "g32", "symmetric": False, "zero_point": "mirrored"}, "Q4_0"),
        ({"format": "int2", "granularity": "g64", "symmetric": False, "zero_point": "mirrored"}, "Q2_0"),
        ({"format": "int2", "granularity": "g64"}, "Q2_0"),
        ({"format": "int2", "granularity": "g192"}, "Q2_0"),  # and a last group of 128
        ({"format": "int2", "granularity": "g32"}, "Q4_0"),
        ({"format": "ternary", "granularity": "g64"}, "Q2_0"),
        ({"format": "ternary", "granularity": "g32"}, "Q4_0"),
        ({"format": "binary", "granularity": "g64"}, "Q2_0"),
        ({"format": "binary", "granularity": "g128"}, "Q1_0"),
        ({"format": "ternary", "granularity": "g256"}, "TQ1_0"),
        ({"format": "ternary", "granularity": "tensor"}, "TQ1_0"),
        ({"format": "binary", "granularity": "channel"}, "Q1_0"),
        ({"format": "int2", "granularity": "g256"}, "Q2_0"),
        ({"format": "int3", "granularity": "g256"}, "Q3_K"),
        ({"format": "int3", "granularity": "tensor"}, "Q3_K"),
        ({"format": "iq4_nl"}, "IQ4_NL"),
        ({"format": "iq4_xs"}, "IQ4_XS"),
        ({"format": "int5", "granularity": "g32"}, "Q5_0"),
        ({"format": "int5", "granularity": "g32", "symmetric": False, "zero_point": "mirrored"}, "Q5_0"),
        ({"format": "int5", "granularity": "g32", "symmetric": False, "zero_point": "minimum"}, "Q5_1"),
        ({"format": "int4", "granularity": "g32", "symmetric": False, "zero_point": "minimum"}, "Q4_1"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_exact_types(scheme, kind):
    tensor = quantize_tensor(matrix(), WeightScheme.model_validate({"scale": "mse"} | scheme))
    blocks = as_blocks(tensor)
    assert blocks is not None
    assert blocks.kind.name == kind
    assert torch.equal(decoded(blocks), tensor.dequantize())
    assert blocks.data.size * 8 == bits_of(blocks.kind) * 24 * 512
    assert planned_kind(description(tensor), 512) is blocks.kind


def test_tiny_weights_do_not_keep_a_matrix_out_of_its_type():
    """Scales below fp16's normal numbers, as dead rows of real models have, are stored as they are."""
    weight = matrix()
    weight[3] *= 1e-5
    weight[4] = 0
    tensor = quantize_tensor(weight, WeightScheme(format="int4", granularity="g32"))
    assert 0 < tensor.scale[3].max() < torch.finfo(torch.float16).smallest_normal
    blocks = as_blocks(tensor)
    assert blocks is not None
    assert blocks.kind.name == "Q4_0"
    assert torch.equal(decoded(blocks), tensor.dequantize())
    in_more_bits = WeightScheme(format="int4", granularity="g32", scale_dtype="float32")
    assert as_blocks(quantize_tensor(weight, in_more_bits)) is None


@pytest.mark.parametrize(
    "scheme",
    [
        {"format": "int4", "granularity": "g32", "symmetric": False},
        {"format": "int4", "granularity": "channel", "symmetric": False, "zero_point": "free"},
        {"format": "int2", "granularity": "g64", "offset": 0.5},
        {"format": "int2", "granularity": "g64", "symmetric": False, "zero_point": "middle"},
        {"format": "binary", "granularity": "g64", "symmetric": False},
    ],
    ids=lambda scheme: "-".join(map(str, scheme.values())),
)
def test_a_minimum_is_rounded_to_half_precision(scheme):
    tensor = quantize_tensor(matrix(), WeightScheme.model_validate({"scale": "mse"} | scheme))
    blocks = as_blocks(tensor)
    assert blocks is not None
    assert blocks.kind.name == "Q4_1"
    difference = (decoded(blocks) - tensor.dequantize()).abs().max()
    steps = difference / tensor.scale.float().max()
    assert 0 < steps <= 16 * 2**-11


def test_rows_that_super_blocks_do_not_divide_take_a_wider_type():
    scheme = WeightScheme(format="ternary", granularity="channel")
    assert as_blocks(quantize_tensor(matrix(512), scheme)).kind.name == "TQ1_0"
    tensor = quantize_tensor(matrix(576), scheme)
    blocks = as_blocks(tensor)
    assert blocks.kind.name == "Q2_0"
    assert torch.equal(decoded(blocks), tensor.dequantize())
    blocks = as_blocks(quantize_tensor(matrix(544), scheme))
    assert blocks.kind.name == "Q4_0"


@pytest.mark.parametrize(
    "scheme",
    [
        {"format": "int4", "granularity": "g48"},
        {"format": "fp8_e4m3", "granularity": "channel"},
        {"format": "int8", "granularity": "g32", "symmetric": False},
    ],
    ids=lambda scheme: "-".join(map(str, scheme.values())),
)
def test_what_no_type_holds(scheme):
    tensor = quantize_tensor(matrix(), WeightScheme.model_validate(scheme))
    assert as_blocks(tensor) is None


def test_what_is_added_to_the_codes_has_no_type():
    tensor = quantize_tensor(matrix(), WeightScheme(format="int4", granularity="g32"))
    assert as_blocks(replace(tensor, residual=tensor)) is None
    factors = LowRank(torch.ones(24, 1).half(), torch.ones(1, 512).half())
    assert as_blocks(replace(tensor, low_rank=factors)) is None


def test_scales_beyond_half_precision_have_no_type():
    scheme = WeightScheme(format="int4", granularity="g32", scale_dtype="float32")
    assert as_blocks(quantize_tensor(matrix() * 1e7, scheme)) is None
    assert as_blocks(quantize_tensor(matrix() * 1e-7, scheme)) is None
    zero = quantize_tensor(torch.zeros(24, 512), scheme)
    assert torch.equal(decoded(as_blocks(zero)), torch.zeros(24, 512))


@pytest.mark.parametrize(
    ("format", "zero_point", "granularity", "kind"),
    [
        ("int4", 8, "g32", "Q4_0"),  # -8 ... 7
        ("int4", 7, "g32", "Q4_0"),  # -7 ... 8, with a scale below zero
        ("int4", 6, "g32", "Q4_1"),  # -6 ... 9
        ("int4", 9, "g32", "Q4_1"),  # -9 ... 6
        ("int3", 4, "channel", "Q3_K"),  # -4 ... 3
        ("int3", 3, "channel", "Q4_0"),  # -3 ... 4
        ("int3", 5, "channel", "Q4_0"),  # -5 ... 2
        ("int2", 0, "channel", "Q2_K"),
        ("int2", 1, "channel", "Q2_0"),  # -1 ... 2
        ("int2", 2, "channel", "Q2_0"),  # -2 ... 1, with a scale below zero
        ("int8", 128, "g32", "Q8_0"),  # -128 ... 127
        ("int8", 127, "g32", None),
        ("int8", 129, "g32", None),
    ],
)
def test_the_ends_of_each_range(format, zero_point, granularity, kind):
    scheme = WeightScheme(format=format, granularity=granularity, symmetric=False)
    levels = 2 ** int(scheme.number_format.bits)
    codes = (torch.arange(2 * 512) % levels).float().view(2, 512)
    groups = 16 if granularity == "g32" else 1
    scale = torch.full((2, groups), 0.125)
    tensor = from_codes(codes, scale, scheme, zero_point=torch.full((2, groups), float(zero_point)))
    blocks = as_blocks(tensor)
    assert (None if blocks is None else blocks.kind.name) == kind
    if blocks is not None:
        assert torch.equal(decoded(blocks), tensor.dequantize())


def test_each_block_takes_the_sign_that_it_needs():
    """Groups of 64 that lie on one side each, in one matrix."""
    scheme = WeightScheme(format="int2", granularity="g64", symmetric=False, zero_point="mirrored")
    codes = (torch.arange(2 * 128) % 4).float().view(2, 128)
    zero = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    tensor = from_codes(codes, torch.full((2, 2), 0.25), scheme, zero_point=zero)
    blocks = as_blocks(tensor)
    scales = torch.from_numpy(blocks.data.reshape(2, 2, 18)[..., :2].copy()).view(torch.float16)
    assert scales[..., 0].tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    assert torch.equal(decoded(blocks), tensor.dequantize())


def test_the_bytes_of_the_new_types_are_those_of_ggml():
    """By hand: d = 0.5 (0x3800), then 2-bit fields or bits, lowest first."""
    two = WeightScheme(format="int2", granularity="g64", symmetric=False)
    codes = torch.tensor([[0.0, 1, 2, 3] * 16])
    blocks = as_blocks(from_codes(codes, torch.full((1, 1), 0.5), two, zero_point=torch.ones(1, 1)))
    assert blocks.data.tolist() == [[0x00, 0x38, *[0b11100100] * 16]]
    one = WeightScheme(format="binary", granularity="g128")
    codes = torch.tensor([[1.0, -1, -1, -1, 1, 1, -1, -1] * 16])
    blocks = as_blocks(from_codes(codes, torch.full((1, 1), 0.5), one))
    assert blocks.data.tolist() == [[0x00, 0x38, *[0b00110001] * 16]]

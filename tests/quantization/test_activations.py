"""Rounded inputs: against plain loops, and what a recipe's part refuses."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.recipe.formats import INPUT_FORMATS
from bitassay.quantization.recipe.inputs import Activations, InputScheme, has_product
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.linear import RoundedInputLinear

INTEGERS = [name for name, fmt in INPUT_FORMATS.items() if fmt.kind == "integer"]
F = np.float32


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 2 + 0.5


def by_loops(
    token: list[float], bits: int, symmetric: bool, scale=None, zero=None, factor=1.0
) -> list[float]:
    """One token, one number at a time, in fp32."""
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    if scale is None and symmetric:
        scale = F(max(abs(F(v)) for v in token)) / F(half - 1)
    elif scale is None:
        least, most = F(min(0, *token)), F(max(0, *token))
        scale = (most - least) / F(high)
        zero = np.clip(np.round(-least / scale), low, high)
    scale, zero = F(scale) * F(factor), F(0 if zero is None else zero)
    codes = [np.clip(np.round(F(v) / scale) + zero, low, high) for v in token]
    return [float((F(code) - zero) * scale) for code in codes]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [False, True])
def test_integers_are_what_plain_loops_compute(name, symmetric, static):
    x, bits = inputs(5, 13), int(INPUT_FORMATS[name].bits)
    scale, zero = (
        (F(3.0 / 2**bits).item(), None if symmetric else 2 ** (bits - 2)) if static else (None, None)
    )
    rounding = InputRounding(name, symmetric, scale, zero)
    expected = [by_loops(token, bits, symmetric, scale, zero) for token in x.tolist()]
    torch.testing.assert_close(rounded_inputs(x, rounding), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_factor_is_of_the_steps_and_leaves_the_zero_point(symmetric, factor):
    x = inputs(5, 13)
    expected = [by_loops(token, 4, symmetric, factor=factor) for token in x.tolist()]
    found = rounded_inputs(x, InputRounding("int4", symmetric, scale_factor=factor))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0)
    assert not torch.equal(found, rounded_inputs(x, InputRounding("int4", symmetric)))


def test_a_factor_that_changes_nothing_is_not_written_out():
    assert "scale_factor" not in Activations(format="int8").model_dump()
    assert Activations(scale_factor=0.9).model_dump()["scale_factor"] == 0.9
    with pytest.raises(ValueError, match=r"0.5 times a scale of 2.0"):
        InputRounding("int8", scale=2.0, scale_factor=0.5)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_is_the_nearest_value_of_the_dtype(name):
    x, fmt = inputs(5, 13), INPUT_FORMATS[name]
    values = torch.arange(256, dtype=torch.uint8).view(fmt.float_dtype).float()
    values = values[values.isfinite()]
    for token, rounded in zip(x, rounded_inputs(x, InputRounding(name)), strict=True):
        scale = token.abs().max() / fmt.largest
        nearest = (token[:, None] - values * scale).abs().amin(1)
        torch.testing.assert_close((rounded - token).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_rounding_moves_no_input_by_more_than_half_a_step(name, symmetric):
    x = inputs(50, 20)
    rounded = rounded_inputs(x, InputRounding(name, symmetric))
    levels = 2 ** INPUT_FORMATS[name].bits - (2 if symmetric else 1)
    spread = 2 * x.abs().amax(1) if symmetric else x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    # An asymmetric grid may lose half a step more at its ends, where the zero point was rounded.
    step = (spread / levels)[:, None] * (0.5 if symmetric else 1.0)
    assert ((rounded - x).abs() <= step * 1.001 + 1e-6).all()


def test_static_rounding_clips():
    x = torch.tensor([[0.75, 50.0, -50.0]])
    clipped = torch.tensor([[0.75, 127 / 4, -128 / 4]])
    assert torch.equal(rounded_inputs(x, InputRounding("int8", scale=0.25)), clipped)


@pytest.mark.parametrize("scale", [None, 0.02])
def test_outlier_columns_stay_and_do_not_widen_the_others_steps(scale):
    x = inputs(6, 10)
    x[:, [2, 7]] *= 300
    rounding = InputRounding("int8", scale=scale, outliers=(2, 7))
    rounded = rounded_inputs(x, rounding)
    assert torch.equal(rounded[:, [2, 7]], x[:, [2, 7]])
    rest = [c for c in range(10) if c not in (2, 7)]
    assert torch.equal(rounded[:, rest], rounded_inputs(x[:, rest], InputRounding("int8", scale=scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_kept_and_so_is_a_view(dtype):
    x = inputs(2, 6, 10).to(dtype).transpose(0, 1)
    rounded = rounded_inputs(x, InputRounding("int4"))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, rounded_inputs(x.contiguous(), InputRounding("int4")))
    assert torch.equal(rounded[3, 1], rounded_inputs(x[3, 1], InputRounding("int4")))
    assert rounded_inputs(x[:0], InputRounding("int4")).shape == x[:0].shape


def test_the_fake_linear_multiplies_rounded_inputs_with_the_given_linears_own_weight():
    linear, x = torch.nn.Linear(10, 4), inputs(3, 10)
    fake = RoundedInputLinear(linear, InputRounding("int4"))
    assert fake.weight is linear.weight
    assert fake.bias is linear.bias
    expected = torch.nn.functional.linear(
        rounded_inputs(x, InputRounding("int4")), linear.weight, linear.bias
    )
    assert torch.equal(fake(x), expected)
    assert "int4 inputs per token" in repr(fake)
    assert RoundedInputLinear(torch.nn.Linear(2, 2, bias=False), InputRounding("int8")).bias is None


def test_the_first_override_that_matches_wins():
    part = Activations.model_validate(
        {
            "format": "int8",
            "overrides": [
                {"match": "*.down_proj", "inputs": {"format": "int16"}},
                {"match": "layers.1.*", "inputs": None},
            ],
        }
    )
    assert part.scheme_for("layers.1.down_proj").format == "int16"
    assert part.scheme_for("layers.1.up_proj") is None
    assert part.scheme_for("layers.0.up_proj").format == "int8"


def test_what_needs_calibration_says_so():
    assert not Activations().needs_text
    assert Activations(scale="kl").needs_text
    assert Activations.model_validate({"outliers": {"sigma": 6}}).needs_text
    override = {"match": "*", "inputs": {"scale": "absmax"}}
    assert Activations.model_validate({"overrides": [override]}).needs_text


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"format": "int5"}, "unknown input format"),
        ({"format": "fp8_e4m3", "symmetric": False}, "zero point"),
        ({"scale": "kl", "symmetric": False}, "both signs"),
        ({"scale": "learned", "symmetric": False}, "both signs"),
        ({"scale": "kl", "format": "int16"}, "256 equal steps"),
        ({"scale": "kl", "format": "fp8_e4m3"}, "256 equal steps"),
        ({"percentile": 99.0}, "no effect"),
        ({"scale": "absmax", "momentum": 0.5}, "no effect"),
        ({"scale": "percentile", "percentile": 40}, "greater than or equal to 50"),
        ({"outliers": {}}, "sigma or percentile"),
        ({"outliers": {"sigma": 6, "percentile": 99}}, "sigma or percentile"),
        ({"outliers": {"sigma": math.nan}}, "greater than 0"),
        ({"clip": 1}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(part, says):
    with pytest.raises(ValidationError, match=says):
        InputScheme.model_validate(part)


def test_integers_and_fp8_do_not_multiply():
    fp8, int8 = WeightScheme(format="fp8_e4m3"), WeightScheme(format="int8")
    assert not has_product(InputScheme(format="int8"), fp8)
    assert has_product(InputScheme(format="fp8_e5m2"), fp8)
    assert has_product(InputScheme(format="int16"), int8)
    assert has_product(InputScheme(format="fp8_e4m3"), int8)

"""Copies that are merged: what theory says of each kind, on Gaussian and uniform weights."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from bitassay.quantization.codes.copies import merged, planes, scaled
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.storage import description, planned, planned_bits
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.recipe.weights import Copies, WeightScheme
from bitassay.quantization.runtime.linear import QuantizedLinear


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(weight, quantized):
    """Signal to noise."""
    error = (quantized - weight).double().square().mean() / weight.double().square().mean()
    return -10 * math.log10(error)


def scheme(format="int2", copies=None, **fields):
    return WeightScheme.model_validate({"format": format, "granularity": "g64", "copies": copies} | fields)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_offset_grids_average_to_one_grid_of_step_1_over_n(n):
    """Inside the range, to the bit of fp16 scales; so the error of uniform weights falls by n^2."""
    w = torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    w[:, ::64] = 8 / 7  # the step is 8 / (7 (7 + (n - 1) / 2n)) whatever else is in the group
    copies = {"count": n, "differ": "offset"}
    fine = quantize_tensor(w, scheme("int4", copies, scale="absmax", scale_dtype="float32"))
    parts = planes(fine)
    assert len(parts) == n
    step = parts[0].scale.repeat_interleave(64, 1).float() * n
    inside = torch.ones_like(w, dtype=torch.bool)
    inside[:, ::64] = False
    places = (w / step - (n - 1) / (2 * n)) * n  # on the grid of step s/n, shifted to the copies' middle
    expected = (places.round() / n + (n - 1) / (2 * n)) * step
    near_a_tie = (places - places.round()).abs() > 0.499
    torch.testing.assert_close(
        fine.dequantize()[inside & ~near_a_tie], expected[inside & ~near_a_tie], rtol=0, atol=1e-5
    )
    one = quantize_tensor(w, scheme("int4", scale="absmax", scale_dtype="float32"))
    ratio = (
        (one.dequantize() - w)[inside].square().mean() / (fine.dequantize() - w)[inside].square().mean()
    ).item()
    assert ratio == pytest.approx(n * n, rel=0.2)


def test_residual_codes_of_two_bits_have_four_bits_quality():
    """19.3 dB for 2 + 2 bits of long Gaussian rows, if the first plane is wide; 13 for two grids averaged."""
    w = weights(64, 2048)

    def quality(differ=None, format="int2", **fields):
        values = fields.pop("values", ())
        copies = None if differ is None else {"count": 2, "differ": differ, "values": values}
        own = scheme(format, copies, granularity="channel", scale="mse", **fields)
        return decibels(w, quantize_tensor(w, own).dequantize())

    assert quality(offset=0.5) == pytest.approx(9.2, abs=0.15)
    assert quality(offset=0.5, scale_factor=1.3) == pytest.approx(8.3, abs=0.15)  # the wide first plane alone
    assert quality("offset") == pytest.approx(12.9, abs=0.15)
    assert quality("residual", offset=0.5) == pytest.approx(16.9, abs=0.15)
    assert quality("residual", offset=0.5, values=(1.3, 1)) == pytest.approx(19.3, abs=0.15)
    assert quality(format="int4") == pytest.approx(19.3, abs=0.15)


@pytest.mark.parametrize(
    ("format", "count", "whole"), [("int2", 2, "int4"), ("int2", 4, "int8"), ("int4", 2, "int8")]
)
@pytest.mark.parametrize("granularity", ["channel", "g48"])
def test_digits_are_the_grid_of_all_bits_in_planes(format, count, whole, granularity):
    """To the bit, and the first plane is that grid cut off: no farther from it than half its own step."""
    w = weights(24, 160)
    fields = {"granularity": granularity, "offset": 0.5, "scale": "mse"}
    expected = quantize_tensor(w, scheme(whole, **fields))
    found = quantize_tensor(w, scheme(format, {"count": count, "differ": "digits"}, **fields))
    parts = planes(found)
    assert [part.scheme.format for part in parts] == [format] * count
    assert torch.equal(found.dequantize(), expected.dequantize())
    steps = [part.grid.scale for part in parts]
    base = 2 ** int(parts[0].format.bits)
    assert all(torch.equal(one, base * other) for one, other in pairwise(steps))
    apart = (parts[0].dequantize() - expected.dequantize()).abs()
    size = 160 if granularity == "channel" else 48
    assert (apart <= steps[0].repeat_interleave(size, 1)[:, :160] / 2).all()


@pytest.mark.parametrize("n", [2, 4])
def test_n_grids_of_the_inputs_reach_log2_n_more_bits(n):
    x = torch.rand(32, 512, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x[:, 0] = 1

    def noise(**fields):
        return (rounded_inputs(x, InputRounding(**fields)) - x)[:, 1:].square().mean().item()

    four, several = noise(format="int4"), noise(format="int4", copies=n)
    assert four / several == pytest.approx(n * n, rel=0.15)
    assert math.log2(four / several) / 2 == pytest.approx(math.log2(n), abs=0.12)
    by_hand = torch.stack(
        [rounded_inputs(x, InputRounding("int4", copies=n, copy=i)) for i in range(n)]
    ).mean(0)
    torch.testing.assert_close(rounded_inputs(x, InputRounding("int4", copies=n)), by_hand)
    assert not rounded_inputs(torch.zeros(1, 8), InputRounding("int4", copies=n)).any()


CASES = {
    "residual": {"differ": "residual"},
    "offset": {"differ": "offset"},
    "offsets": {"differ": "offset", "values": (0.1, 0.6)},
    "weighted": {"differ": "scale", "values": (0.9, 1.2), "coefficients": (0.7, 0.3)},
    "clip": {"differ": "clip", "values": (99, 99.9)},
    "noise": {"differ": "noise", "values": (0, 0.1)},
    "seed": {"differ": "seed", "seed": 5},
    "rotation": {"differ": "rotation"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merged_copies_are_the_sum_of_their_products(case):
    """Parallel copies of one linear are one linear: their outputs' weighted sum is its output."""
    w, x = weights(48, 192), weights(5, 192, seed=3)
    own = scheme(copies={"count": 2} | case)
    whole = quantize_tensor(w, own)
    parts = planes(whole)
    assert len(parts) == 2
    apart = sum(x @ part.dequantize().T for part in parts)
    linear = QuantizedLinear(whole, None, torch.float32)
    torch.testing.assert_close(linear(x), apart, rtol=1e-4, atol=1e-4)
    assert not torch.equal(parts[0].dequantize(), parts[1].dequantize())
    assert description(whole) == planned(own)
    assert whole.stored_bits == planned_bits(planned(own), (48, 192)) == sum(p.stored_bits for p in parts)
    assert torch.equal(merged(parts).dequantize(), whole.dequantize())
    if case["differ"] not in ("residual", "offset"):
        copies = own.copies
        alone = [quantize_tensor(w, copies.scheme(own, i)).dequantize() for i in range(2)]
        expected = copies.shares[0] * alone[0] + copies.shares[1] * alone[1]
        torch.testing.assert_close(whole.dequantize(), expected, rtol=2e-3, atol=1e-3)


def test_each_copy_differs_as_it_says():
    w = weights(8, 64)
    base = quantize_tensor(w, scheme())
    assert torch.allclose(
        quantize_tensor(w, scheme(scale_factor=2)).scale.float(), 2 * base.scale.float(), rtol=2e-3
    )
    turned = quantize_tensor(w, scheme(turned=3))
    assert not torch.equal(turned.packed, base.packed)
    assert decibels(w, turned.dequantize()) == pytest.approx(decibels(w, base.dequantize()), abs=2)
    # A rotation spreads an outlier over its group.
    w[:, 5] = 40
    assert decibels(w, quantize_tensor(w, scheme("int4", turned=3)).dequantize()) > 15
    seeds = [quantize_tensor(w, Copies(count=2, differ="seed").scheme(scheme(), i)) for i in range(2)]
    assert not torch.equal(seeds[0].packed, seeds[1].packed)


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5, 2 / 3, 0.9])
def test_a_grid_with_any_offset_clips_nothing(offset):
    w = weights(16, 64)
    tensor = quantize_tensor(w, scheme("int4", scale="absmax", offset=offset))
    half = tensor.scale.float().repeat_interleave(64, 1) / 2
    assert ((tensor.dequantize() - w).abs() <= half * 1.01).all()


def test_importance_moves_the_common_scale():
    w, h = weights(16, 64), torch.ones(64)
    h[:4] = 1000
    w[:, :4] *= 0.05
    own = scheme(copies={"count": 2, "differ": "offset"})
    plain, weighed = (quantize_tensor(w, own, "w", importance) for importance in (None, h))
    errors = [((t.dequantize() - w).square() * h).sum() for t in (plain, weighed)]
    assert errors[1] < errors[0]


def test_scaling_by_one_changes_nothing():
    tensor = quantize_tensor(weights(8, 64), scheme("binary", symmetric=False))
    assert scaled(tensor, 1) is tensor
    torch.testing.assert_close(scaled(tensor, 0.5).dequantize(), tensor.dequantize() / 2)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"copies": {"count": 2, "differ": "scale"}}, "need as many"),
        ({"copies": {"count": 2, "differ": "offset", "values": [0.1]}}, "need as many"),
        ({"copies": {"count": 2, "differ": "seed", "values": [1, 2]}}, "have none"),
        ({"copies": {"count": 2, "differ": "residual", "values": [1]}}, "need as many"),
        ({"copies": {"count": 2, "differ": "residual", "coefficients": [1, 2]}}, "summed as they are"),
        ({"copies": {"count": 2, "differ": "seed", "coefficients": [1]}}, "need as many"),
        ({"copies": {"count": 2, "differ": "digits"}}, "offset: 0.5"),
        ({"copies": {"count": 3, "differ": "digits"}, "offset": 0.5}, "2 of int2 or int4, 4 of int2"),
        ({"copies": {"count": 2, "differ": "digits"}, "offset": 0.5, "noise": 0.1}, "rounded to nearest"),
        ({"copies": {"count": 2, "differ": "digits", "values": [1, 2]}, "offset": 0.5}, "have none"),
        (
            {"copies": {"count": 2, "differ": "digits", "coefficients": [1, 2]}, "offset": 0.5},
            "summed as they are",
        ),
        ({"copies": {"count": 2, "differ": "clip", "values": [99, 10]}}, "greater than 50"),
        ({"copies": {"count": 2, "differ": "offset"}, "offset": 0.5}, "offsets of their own"),
        ({"copies": {"count": 2, "differ": "offset"}, "scale": "percentile"}, "share one scale"),
        ({"format": "ternary", "copies": {"count": 2, "differ": "offset"}}, "offset shifts"),
        ({"format": "binary", "residual": 1, "copies": {"count": 2, "differ": "seed"}}, "planes"),
        ({"copies": {"count": 17, "differ": "seed"}}, "less than or equal to 16"),
    ],
)
def test_copies_that_make_no_sense_are_refused(fields, why):
    with pytest.raises(ValidationError, match=why):
        WeightScheme.model_validate({"format": "int2", "granularity": "g64"} | fields)

"""Ranges of the linears' inputs, and the roundings that follow from them."""

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.models.walk import walk
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.inputs.ranges import (
    SAMPLED_TOKENS,
    Ranges,
    collect_ranges,
    input_roundings,
    outlier_columns,
    rounding_from,
)
from bitassay.quantization.inputs.thresholds import kl_threshold, learned_threshold, percentile_threshold
from bitassay.quantization.recipe.inputs import Activations, OutlierColumns
from bitassay.testing.tiny import tiny_model

TOKENS = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))


def ranges_of(inputs: torch.Tensor) -> Ranges:
    """Of inputs `[batches, tokens, in]`, all of them sampled."""
    flat = inputs.flatten(0, 1)
    return Ranges(
        inputs.amin(1), inputs.amax(1), flat.mean(0), flat.square().mean(0), flat.abs().mean(0), flat
    )


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)) + 0.5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_ranges_are_those_of_the_inputs(architecture):
    model = tiny_model(architecture)
    linears = walk(model).linears
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    handles = [
        linear.register_forward_hook(lambda m, args, y, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for row in TOKENS:
            model(row[None])
    for handle in handles:
        handle.remove()
    found = collect_ranges(model, TOKENS)
    assert list(found) == list(linears)
    for name, batches in seen.items():
        every, got = torch.cat(batches).double(), found[name]
        assert torch.equal(got.absmax.double(), every.abs().amax(0))
        assert torch.equal(got.batch_high[1].double(), batches[1].double().amax(0))
        assert torch.equal(got.batch_low[2].double(), batches[2].double().amin(0))
        torch.testing.assert_close(got.mean.double(), every.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.mean_square.double(), every.square().mean(0), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(got.mean_magnitude.double(), every.abs().mean(0), rtol=1e-5, atol=1e-9)
        assert got.deviation == pytest.approx(every.std(unbiased=False).item(), rel=1e-4)
        assert len(got.sample) == 120 <= SAMPLED_TOKENS  # every token of so few
        assert torch.equal(got.sample.double(), every)
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_only_the_named_linears_are_watched_and_a_long_text_is_sampled():
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    found = collect_ranges(model, [TOKENS[:, :30].repeat(1, 10), TOKENS], names=[name])
    assert list(found) == [name]
    assert len(found[name].sample) == 128 + 120
    assert len(found[name].batch_low) == 2


def test_dynamic_rounding_needs_no_ranges():
    model = tiny_model("qwen2")
    spec = Activations.model_validate(
        {"format": "fp8_e4m3", "overrides": [{"match": "*.o_proj", "inputs": None}]}
    )
    roundings = input_roundings(model, spec)
    assert set(roundings) == {name for name in walk(model).linears if not name.endswith("o_proj")}
    assert set(roundings.values()) == {InputRounding("fp8_e4m3")}


@pytest.mark.parametrize("scale", ["absmax", "percentile", "moving_average", "kl", "learned"])
def test_static_scales_are_their_rules_threshold_over_the_largest_code(scale):
    x, weight = inputs(4, 50, 12), inputs(6, 12)
    x[2] *= 3
    flat = x.flatten(0, 1)
    maxima = x.abs().amax((1, 2)).tolist()
    average = maxima[0]
    for largest in maxima[1:]:
        average = 0.9 * average + 0.1 * largest
    spec = Activations(scale=scale)
    expected = {
        "absmax": flat.abs().max().item(),
        "percentile": percentile_threshold(flat, 99.9),
        "moving_average": average,
        "kl": kl_threshold(flat, 128),
        "learned": learned_threshold(flat, weight.square().sum(0), InputRounding("int8").number_format),
    }
    rounding = rounding_from(spec, ranges_of(x), weight)
    assert rounding.scale == pytest.approx(expected[scale] / 127, rel=1e-6)
    assert rounding.zero_point is None


@pytest.mark.parametrize("scale", ["absmax", "percentile", "moving_average"])
def test_asymmetric_grids_reach_both_ends(scale):
    x = inputs(4, 50, 12).clamp(min=-0.7)
    rounding = rounding_from(Activations(scale=scale, symmetric=False), ranges_of(x), inputs(6, 12))
    assert rounding.zero_point is not None
    assert 0 < rounding.zero_point < 127
    if scale == "absmax":
        assert rounding.scale is not None
        assert rounding.scale * 255 == pytest.approx((x.max() - x.min()).item(), rel=1e-5)
        error = (rounded_inputs(x, rounding) - x).abs().max().item()
        assert error <= rounding.scale * 1.001
    assert (
        rounding_from(
            Activations(scale=scale, symmetric=False), ranges_of(x.clamp(min=0.1)), inputs(6, 12)
        ).zero_point
        == 0
    )  # 0 is always inside


def test_inputs_that_are_all_zero_get_a_scale():
    for symmetric in (True, False):
        spec = Activations(scale="absmax", symmetric=symmetric)
        assert rounding_from(spec, ranges_of(torch.zeros(2, 5, 3)), inputs(4, 3)).scale == 1


def test_outlier_columns_by_sigma_and_percentile_and_their_threshold_is_of_the_rest():
    x = inputs(2, 100, 20)
    x[..., [3, 11]] *= 40
    found = ranges_of(x)
    assert outlier_columns(found, OutlierColumns(sigma=6)) == (3, 11)
    assert outlier_columns(found, OutlierColumns(sigma=600)) == ()
    assert outlier_columns(found, OutlierColumns(percentile=95)) == (found.absmax.argmax().item(),)
    assert len(outlier_columns(found, OutlierColumns(percentile=50))) == 10
    assert outlier_columns(found, OutlierColumns(sigma=1e-3)) == ()  # never all
    spec = Activations.model_validate({"scale": "absmax", "outliers": {"sigma": 6}})
    rounding = rounding_from(spec, found, inputs(6, 20))
    rest = [c for c in range(20) if c not in (3, 11)]
    assert rounding.outliers == (3, 11)
    assert rounding.scale == pytest.approx(x[..., rest].abs().max().item() / 127)
    dynamic = Activations.model_validate({"outliers": {"sigma": 6}})
    assert rounding_from(dynamic, found, inputs(6, 20)) == InputRounding("int8", outliers=(3, 11))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_factor_widens_the_steps_and_leaves_the_zero_point(symmetric):
    plain, narrow = (
        rounding_from(
            Activations(scale="absmax", symmetric=symmetric, scale_factor=factor),
            ranges_of(inputs(2, 5, 12)),
            inputs(6, 12),
        )
        for factor in (1.0, 0.8)
    )
    assert narrow.scale == pytest.approx(0.8 * plain.scale)
    assert narrow.zero_point == plain.zero_point
    assert rounding_from(Activations(scale_factor=0.8), ranges_of(inputs(2, 5, 12)), inputs(6, 12)) == (
        InputRounding("int8", scale_factor=0.8)
    )


def test_static_without_calibration_is_refused():
    for part in ({"scale": "absmax"}, {"outliers": {"sigma": 6}}):
        with pytest.raises(BitassayError, match="no calibration"):
            input_roundings(tiny_model("llama"), Activations.model_validate(part))


def test_an_override_that_matches_nothing_is_refused():
    spec = Activations.model_validate({"overrides": [{"match": "*.dwn_proj", "inputs": None}]})
    with pytest.raises(BitassayError, match=r"\*\.down_proj"):
        input_roundings(tiny_model("llama"), spec)


def test_fused_experts_are_refused_unless_left_alone():
    model = tiny_model("mixtral")
    with pytest.raises(BitassayError, match="fused experts"):
        input_roundings(model, Activations())
    spec = Activations.model_validate({"overrides": [{"match": "*.experts.*", "inputs": None}]})
    assert set(input_roundings(model, spec)) == set(walk(model).linears)


def test_calibration_inputs_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(BitassayError, match=r"layers\.1\.mlp.*not finite"):
        collect_ranges(model, TOKENS, names=["model.layers.1.mlp.up_proj"])

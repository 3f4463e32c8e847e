"""What a replicated recipe is compared with."""

import json

import pytest
import torch

from bitassay import cli
from bitassay.models.walk import matrices
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import Chosen
from bitassay.quantization.replication.controls import controls
from bitassay.quantization.runtime.model import bits_per_weight, quantization_of

RESIDUAL = {"how": "parallel", "of": "linear", "differ": "residual"}
INT2 = {"format": "int2", "granularity": "g32", "symmetric": False}
FEW = {"samples": 4, "tokens": 48}


def recipe(replication, weights=None, **parts):
    weights = weights or {"format": "int2", "granularity": "g64", "symmetric": False}
    return Recipe.model_validate({"name": "x", "weights": weights, "replication": replication} | parts)


def by_kind(own, layers=5):
    return {kind: control.recipe for control in controls(own, layers) for kind in control.kinds}


def test_every_plan_has_all_three():
    for plan in ({}, RESIDUAL, {"differ": "seed"}, {"layers": "progressive"}, {"layers": [1]}):
        found = by_kind(recipe(plan))
        assert found.keys() == {"single", "equal-bits", "equal-flops"}
        assert all(control.replication is None for control in found.values())
    assert controls(recipe({"copies": 1}), 5) == controls(recipe(None), 5) == []


@pytest.mark.parametrize("layers", ["all", [1, 4], {1: 2, 2: 1, 4: 2}, {"by": "kl"}], ids=str)
def test_fitted_copies_are_beside_the_same_layers_rescaled(layers):
    found = by_kind(recipe({"coefficients": "fitted", "layers": layers}))
    assert found.keys() == {"single", "rescaled", "equal-bits", "equal-flops"}
    plan = found["rescaled"].replication
    assert (plan.copies, plan.coefficients) == (1, "fitted")
    own = found["rescaled"].replication.layers
    assert own == (Chosen(by="kl") if layers == {"by": "kl"} else "all" if layers == "all" else (1, 4))


def test_rescaling_is_the_first_step_of_fitting(stories):
    """A fitted replica begins with what its rescaled control ends with."""
    own = recipe({"coefficients": "fitted", "layers": [0, 3]}, calibration=FEW)
    control = by_kind(own)["rescaled"]
    twice, once = (quantization_of(quantize(stories, r)).passes for r in (own, control))
    assert twice.keys() == once.keys() == {0, 3}
    assert once[0].count == 1
    assert (once[0].keep, once[0].add) == (twice[0].keep[:1], twice[0].add[:1])
    assert (once[0].keep, once[0].add) != ((1.0,), (1.0,))


def test_layers_that_begin_later_are_matched_too():
    """A list that leaves the first layer out has controls of as many bits as any."""
    first, later = (by_kind(recipe(RESIDUAL | {"layers": list(layers)})) for layers in ((0, 1), (2, 3)))
    assert later["equal-bits"] == first["equal-bits"] != later["single"]


def codes(model):
    return {name: tensor.packed for name, tensor in quantization_of(model).tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["text named", "text of the part alone"])
def test_a_fitted_replica_and_its_single_control_have_the_same_codes(stories, named):
    """Both weighed by the inputs, or neither: the second pass is all that is between them."""
    parts = {"calibration": FEW} if named else {}
    own = recipe({"coefficients": "fitted"}, INT2, **parts)
    once = codes(quantize(stories, by_kind(own)["single"]))
    assert equal(once, codes(quantize(stories, own)))
    assert equal(once, codes(quantize(stories, recipe(None, INT2, calibration=FEW)))) is named


@pytest.mark.slow
def test_mixed_bits_beside_a_replica_without_text_are_searched_without_text(stories):
    """The text that chooses formats weighs nothing: each matrix is what its scheme alone makes of it."""
    own = recipe(RESIDUAL | {"layers": [0, 3]}, INT2)
    assert not own.is_calibrated
    found = quantization_of(quantize(stories, by_kind(own)["equal-bits"])).tensors
    assert len({tensor.scheme.format for tensor in found.values()}) > 1
    for name, weight in matrices(stories).items():
        assert torch.equal(found[name].packed, quantize_tensor(weight, found[name].scheme).packed)


def test_text_weighs_every_copy_of_a_layer(stories):
    own = recipe({"how": "parallel", "differ": "scale", "values": [1, 1]}, INT2, calibration=FEW)
    found = codes(quantize(stories, own))
    for name in matrices(stories):
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        assert torch.equal(found[name], found[f"model.layers.{layer}.replicas.0.{rest}"])


def test_what_a_replica_leaves_as_it_is_its_controls_leave_too():
    left = [{"match": "model.layers.0.*", "weights": None}]
    recipe = Recipe(name="r", weights={"format": "int2"}, overrides=left, replication=RESIDUAL)
    assert {one.recipe.overrides for one in controls(recipe, 5)} == {recipe.overrides}


def test_unquantized_weights_are_matched_by_the_model_itself():
    own = Recipe.model_validate({"name": "x", "weights": None, "replication": {"coefficients": "mean"}})
    found = by_kind(own)
    assert found["single"] == found["equal-bits"] == Recipe(name="x-single", weights=None)


def test_shared_copies_store_nothing_and_work_as_more_bits():
    found = by_kind(recipe({"copies": 2}))
    assert found["equal-bits"] == found["single"]
    assert found["single"].weights == recipe(None).weights
    assert (found["equal-flops"].weights.format, found["equal-flops"].weights.granularity) == ("int4", "g32")


def test_passes_that_stop_are_matched_by_what_their_budget_allows():
    stop = {"copies": 3, "coefficients": [1, 0.1, 0.1]}
    budgets = (None, 99, 2, 0)
    found = [by_kind(recipe(stop | {"stop": {"budget": budget}})) for budget in budgets]
    average = 2 + 18 / 64  # of int2 with zero points in groups of 64
    assert found[0]["equal-flops"] == found[1]["equal-flops"] == by_kind(recipe(stop))["equal-flops"]
    assert found[0]["equal-flops"].mixed.bits == pytest.approx(3 * average, abs=1e-3)
    assert found[2]["equal-flops"].mixed.bits == pytest.approx((1 + 2 / 5) * average, abs=1e-3)
    assert found[3]["equal-flops"] == found[3]["single"]
    seeds = by_kind(recipe(stop | {"differ": "seed", "stop": {"budget": 2}}))
    assert seeds["equal-bits"].mixed.bits > seeds["equal-flops"].mixed.bits
    assert seeds["equal-bits"].name != seeds["equal-flops"].name


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "weights", [{"format": "int2", "granularity": "g64"}, {"format": "int4", "granularity": "g32"}]
)
@pytest.mark.parametrize("plan", [RESIDUAL, {"how": "parallel", "differ": "offset"}])
def test_equal_bits_are_equal(stories, weights, plan):
    own = recipe(plan, weights)
    control = by_kind(own)["equal-bits"]
    assert bits_per_weight(quantize(stories, control)) == pytest.approx(
        bits_per_weight(quantize(stories, own)), rel=0.02
    )


def test_an_offset_is_kept_where_it_helps():
    """A control of levels that lie evenly around zero has such levels too, and less error for it."""
    even = {"format": "int2", "granularity": "g64", "offset": 0.5}
    found = by_kind(recipe(RESIDUAL | {"values": [1.3, 1]}, even))["equal-bits"].weights
    assert (found.format, found.granularity, found.offset) == ("int4", "g32", 0.5)
    some = by_kind(recipe(RESIDUAL | {"layers": [0]}, even))["equal-bits"]
    assert {choice.offset for choice in some.mixed.choices(some.weights)} == {0.5}
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = [
        (quantize_tensor(weight, scheme).dequantize() - weight).square().sum()
        for scheme in (found, found.model_copy(update={"offset": 0.0}))
    ]
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_some_layers_are_matched_by_mixed_bits(stories):
    own = recipe(RESIDUAL | {"layers": [0, 3]}, calibration={"samples": 4, "tokens": 48})
    control = by_kind(own)["equal-bits"]
    assert control.mixed is not None
    wanted = bits_per_weight(quantize(stories, own))
    assert wanted - 0.3 < bits_per_weight(quantize(stories, control)) <= wanted + 0.01
    assert by_kind(recipe(RESIDUAL | {"copies": 3}))["equal-bits"].mixed.bits == pytest.approx(
        3 * 2.28, abs=0.01
    )


def test_input_grids_are_matched_by_wider_inputs():
    plan = {"how": "parallel", "of": "linear", "differ": "inputs"}
    found = by_kind(recipe(plan, activations={"format": "int4"}))
    assert found["equal-flops"].activations.format == "int8"
    assert found["equal-bits"].activations.format == "int4"


def test_eval_prints_them_beside_a_replica(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nweights: {format: int2, granularity: g32}\nreplication: {how: parallel, of: linear, differ: residual}\n"
    )
    args = [
        "eval",
        "stories260k",
        "--recipe",
        str(path),
        "--windows",
        "3",
        "--window",
        "64",
        "--format",
        "json",
    ]
    assert cli.run(args, debug=False) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["role"] for row in rows] == ["replica", "single", "equal-bits, equal-flops"]
    single = rows[1]
    assert single["gain"] == pytest.approx(single["ppl"] - rows[0]["ppl"])
    assert single["gain_ci"][0] < single["gain"] < single["gain_ci"][1]
    assert single["beats"] is True
    assert rows[0]["gain"] is None


def test_codes_of_one_bit_have_controls_that_lie_evenly_around_zero():
    """Levels -1.5 ... 1.5 leave less error than -2 ... 1, and than two binary planes."""
    control = by_kind(recipe(RESIDUAL, {"format": "binary", "granularity": "g64"}))["equal-bits"].weights
    assert (control.format, control.granularity, control.offset) == ("int2", "g32", 0.5)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    lopsided = control.model_copy(update={"offset": 0.0})
    errors = [(quantize_tensor(weight, s).dequantize() - weight).square().sum() for s in (control, lopsided)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("weights", [{"format": "int8"}, {"format": "fp8_e4m3", "granularity": "channel"}])
def test_there_is_no_control_of_more_bits_than_there_are(weights):
    rotated = {"how": "parallel", "of": "linear", "differ": "rotation"}
    assert by_kind(recipe(rotated, weights)).keys() == {"single"}
    assert by_kind(recipe({}, weights)).keys() == {"single", "equal-bits"}


def test_some_layers_beside_overrides_have_no_control_of_a_guessed_size(stories):
    """Of all layers, overrides are widened like the rest."""
    wide = [{"match": "*.down_proj", "weights": {"format": "int4", "granularity": "g32"}}]
    some = by_kind(recipe(RESIDUAL | {"layers": [0]}, overrides=wide))
    assert some.keys() == {"single"}
    own = recipe(RESIDUAL, INT2, overrides=wide)
    stored = [bits_per_weight(quantize(stories, one)) for one in (own, by_kind(own)["equal-bits"])]
    assert stored[1] == pytest.approx(stored[0], rel=0.02)


@pytest.mark.parametrize(("plan", "times"), [({}, 2), ({"layers": [0]}, 1.2)], ids=str)
def test_mixed_bits_are_matched_by_a_larger_budget(plan, times):
    own = recipe(plan, mixed={"bits": 2.6, "samples": 4})
    control = by_kind(own)["equal-flops"]
    assert control.mixed.bits == pytest.approx(times * 2.6)
    assert control.mixed.samples == 4
    formats = [scheme.format for scheme in control.mixed.choices(control.weights)]
    assert formats == ["int2", "int3", "int4", "int8"]


def test_input_grids_of_some_layers_have_no_equal_work():
    plan = {"how": "parallel", "differ": "inputs", "layers": [0]}
    assert by_kind(recipe(plan, activations={"format": "int4"})).keys() == {"single", "equal-bits"}

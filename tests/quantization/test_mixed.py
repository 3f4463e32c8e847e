"""The budget of bits is kept, spent as brute force would, and spent better than evenly."""

from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import bitassay
from bitassay.errors import BitassayError
from bitassay.models.walk import matrices
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import LowRankSpec, Mixed
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import bits_per_weight
from bitassay.quantization.solvers.mixed import allocate, mixed_schemes, units_of
from bitassay.quantization.solvers.sensitivity import mean_divergence
from bitassay.record.run import RunFolder
from bitassay.testing.tiny import tiny_model

GRID = {"granularity": "g32", "symmetric": False}


def recipe(bits: float, overrides=(), formats=("int2", "int3", "int4"), sensitivity="error") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "mixed",
            "weights": {"format": "int4", **GRID},
            "overrides": list(overrides),
            "mixed": {"bits": bits, "formats": list(formats), "sensitivity": sensitivity, "samples": 2},
        }
    )


@pytest.fixture(scope="module")
def tokens(stories):
    return calibration_tokens(stories, Calibration(samples=4, tokens=64))


def brute_force(costs, bits, budget) -> float:
    rows = np.arange(len(costs))
    picks = [np.array(pick) for pick in product(range(costs.shape[1]), repeat=len(costs))]
    return min(costs[rows, pick].sum() for pick in picks if bits[rows, pick].sum() <= budget)


@pytest.mark.sample(5)
@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_what_brute_force_finds(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 2000, (6, 3)) * 8
    costs = rng.lognormal(sigma=4, size=(6, 3))  # over many orders of magnitude, and no order in them
    budget = int(rng.integers(bits.min(1).sum(), bits.max(1).sum() + 1))
    chosen = allocate(costs, bits, budget)
    rows = np.arange(6)
    assert bits[rows, chosen].sum() <= budget
    assert costs[rows, chosen].sum() == pytest.approx(brute_force(costs, bits, budget), rel=1e-9)


def test_every_bit_of_a_budget_may_be_spent_and_none_more():
    bits = np.array([[2, 3, 4]] * 50) * 1_000_003
    costs = np.array([[4.0, 1.0, 0.5]] * 50)
    assert (allocate(costs, bits, 150 * 1_000_003) == 1).all()
    assert bits[np.arange(50), allocate(costs, bits, 150 * 1_000_003 - 1)].sum() < 150 * 1_000_003
    assert (allocate(costs, bits, 100 * 1_000_003) == 0).all()
    with pytest.raises(BitassayError, match="budget"):
        allocate(costs, bits, 100 * 1_000_003 - 1)


def test_a_choice_that_a_matrix_does_not_have_is_never_taken():
    costs = np.array([[np.inf, 5.0], [1.0, np.inf]])
    assert allocate(costs, np.array([[1, 9], [1, 1]]), 10).tolist() == [1, 0]


def test_costs_that_are_all_zero_are_allocated_too():
    assert allocate(np.zeros((2, 2)), np.array([[1, 2], [1, 2]]), 3).sum() <= 1


def test_choices_are_the_recipes_weights_with_other_fields():
    weights = WeightScheme(format="int4", granularity="g32", symmetric=False)
    found = Mixed(bits=3, formats=("int2", {"format": "int4", "granularity": "g64"}, "int8")).choices(weights)
    assert [scheme.format for scheme in found] == ["int2", "int4", "int8"]
    assert [scheme.granularity for scheme in found] == ["g32", "g64", "g32"]
    assert [scheme.scale for scheme in found] == ["mse", "absmax", "absmax"]  # each format's own default
    given = WeightScheme(format="int4", scale="mse")
    assert [s.scale for s in Mixed(bits=3, formats=("int2", "int8")).choices(given)] == ["mse", "mse"]


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"bits": 3, "formats": ["int2", "int2"]}, "same choice twice"),
        ({"bits": 3, "formats": ["int2"]}, "at least 2"),
        ({"bits": 3, "formats": ["int2", "ternary"]}, "ternary codes are symmetric"),
        ({"bits": 3, "formats": ["int2", "int7"]}, "unknown format"),
        ({"bits": 0}, "greater than 0"),
        ({"bits": 3, "sensitivity": "guess"}, "'kl' or 'error'"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(part, why):
    with pytest.raises(ValidationError, match=why):
        Recipe.model_validate({"name": "bad", "weights": {"format": "int4", **GRID}, "mixed": part})


def test_mixed_without_weights_is_refused():
    with pytest.raises(ValidationError, match="variants of weights"):
        Recipe.model_validate({"name": "bad", "weights": None, "mixed": {"bits": 3}})


@pytest.mark.sample(1)
@pytest.mark.parametrize("sensitivity", ["error", "kl"])
def test_better_than_uniform_at_equal_bits(stories, tokens, sensitivity):
    uniform = bitassay.quantize(stories, Recipe(name="u", weights={"format": "int4", **GRID}))
    spec = recipe(bits_per_weight(uniform), formats=("int3", "int4", "int8"), sensitivity=sensitivity)
    schemes = mixed_schemes(stories, spec, tokens)
    assert len({scheme.format for scheme in schemes.values()}) > 1
    overrides = [{"match": name, "weights": scheme} for name, scheme in schemes.items()]
    mixed = bitassay.quantize(stories, Recipe(name="m", weights=None, overrides=overrides))
    assert bits_per_weight(mixed) <= bits_per_weight(uniform)
    assert bits_per_weight(mixed) > bits_per_weight(uniform) - 0.05
    text = calibration_tokens(stories, Calibration(samples=8, tokens=64))[4:]  # not what was measured on
    with torch.inference_mode():
        wanted, *found = (model(text).logits.flatten(0, 1) for model in (stories, uniform, mixed))
    assert mean_divergence(wanted, found[1]) < 0.95 * mean_divergence(wanted, found[0])


def test_the_recipe_does_it(stories):
    spec = recipe(3.0).model_copy(update={"calibration": Calibration(samples=2, tokens=32)})
    model = bitassay.quantize(stories, spec)
    assert 2.9 < bits_per_weight(model) <= 3.0
    assert {"int2", "int3"} <= {tensor.scheme.format for tensor in model.quantization.tensors.values()}


def test_low_rank_factors_count_in_the_budget(stories):
    spec = recipe(5.0).model_copy(
        update={"calibration": Calibration(samples=2, tokens=32), "low_rank": LowRankSpec(rank=2)}
    )
    model = bitassay.quantize(stories, spec)
    assert all(tensor.low_rank is not None for tensor in model.quantization.tensors.values())
    assert 4.8 < bits_per_weight(model) <= 5.0


def test_overrides_keep_their_scheme_and_count(stories, tokens):
    fixed = [
        {"match": "*.down_proj", "weights": {"format": "int8"}},
        {"match": "model.layers.0.*", "weights": None},
    ]
    schemes = mixed_schemes(stories, recipe(4.5, fixed), tokens)
    assert set(schemes) == set(matrices(stories))
    down = [name for name in schemes if name.endswith("down_proj") and ".0." not in name]
    assert all(schemes[name].format == "int8" for name in down)
    assert all(scheme is None for name, scheme in schemes.items() if name.startswith("model.layers.0.self"))
    overrides = [{"match": name, "weights": scheme} for name, scheme in schemes.items()]
    model = bitassay.quantize(stories, Recipe(name="m", weights=None, overrides=overrides))
    assert 4.4 < bits_per_weight(model) <= 4.5


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", [1.0, 9.0])
def test_a_budget_that_the_formats_cannot_meet_names_the_range(stories, tokens, bits):
    with pytest.raises(BitassayError, match=r"the formats take 2\.\d+ to [45]\.\d+") as caught:
        mixed_schemes(stories, recipe(bits), tokens)
    low, _, high = caught.value.remedy.removeprefix("bits: ").partition(",")[0].split(" ")
    for budget in (low, high):  # followed to the letter
        assert mixed_schemes(stories, recipe(float(budget)), tokens)


def test_nothing_to_choose_is_refused(stories, tokens):
    with pytest.raises(BitassayError, match="every matrix has an override"):
        mixed_schemes(stories, recipe(3, [{"match": "*", "weights": {"format": "int4"}}]), tokens)


def test_a_choice_that_was_made_is_kept(stories, tokens, tmp_path):
    folder = RunFolder(tmp_path / "work", {"kind": "test"})
    first = mixed_schemes(stories, recipe(3), tokens, folder=folder)
    said = []
    again = mixed_schemes(stories, recipe(3), tokens, lambda *what: said.append(what), folder)
    assert again == first
    assert not said


def test_slices_of_one_parameter_share_their_choice():
    model = tiny_model("qwen3_moe", num_hidden_layers=2)
    spec = recipe(3.5, [{"match": "*.layers.1.*.down_proj.2", "weights": {"format": "int8"}}])
    units = units_of(model, spec)
    assert len(units) == 2 * (4 + 2) + 1
    tokens = torch.arange(3, 63).view(2, 30)
    schemes = mixed_schemes(model, spec, tokens)
    for layer, parameter in product(range(2), ("gate_up_proj", "down_proj")):
        names = [f"model.layers.{layer}.mlp.experts.{parameter}.{expert}" for expert in range(4)]
        formats = {
            schemes[name].format for name in names if (layer, parameter, name[-1]) != (1, "down_proj", "2")
        }
        assert len(formats) == 1
    assert schemes["model.layers.1.mlp.experts.down_proj.2"].format == "int8"

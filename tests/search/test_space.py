"""Spaces of recipes: paths, values, what is refused."""

import random

import pytest

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.search.space import SHIPPED, Range, Space, find_space

RECIPE = {"weights": {"format": "int2"}, "overrides": [{"match": "*.v_proj", "weights": {"format": "int4"}}]}


def space(**parameters) -> Space:
    return Space.model_validate({"name": "s", "recipe": RECIPE, "parameters": parameters})


def test_values_are_put_where_their_paths_lead():
    found = space(
        **{"weights.granularity": ["g32"], "overrides.0.weights.format": ["int8"], "gptq.damping": [0.1]}
    ).recipe_of({"weights.granularity": "g32", "overrides.0.weights.format": "int8", "gptq.damping": 0.1})
    assert (found.weights.granularity, found.weights.format) == ("g32", "int2")
    assert found.overrides[0].weights.format == "int8"
    assert found.gptq.damping == 0.1


def test_null_takes_a_part_away_and_an_object_is_a_part():
    one = space(gptq=[None, {}])
    assert one.recipe_of({"gptq": None}).gptq is None
    assert one.recipe_of({"gptq": {}}).gptq is not None
    assert RECIPE == {
        "weights": {"format": "int2"},
        "overrides": [{"match": "*.v_proj", "weights": {"format": "int4"}}],
    }


def test_equal_values_give_equal_recipes_and_names():
    one = space(**{"weights.granularity": ["g32", "g64"]})
    first, again, other = (one.recipe_of({"weights.granularity": g}) for g in ("g32", "g32", "g64"))
    assert first == again
    assert first.name != other.name


def test_a_recipe_that_makes_no_sense_is_refused_with_its_reason():
    with pytest.raises(BitassayError, match="unknown format 'int99'"):
        space(**{"weights.format": ["int99"]}).recipe_of({"weights.format": "int99"})


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"overrides.3.match": ["a"]}, "'3' is no place in a list of 1"),
        ({"weights.format.bits": [1]}, "format is 'int2', which has no fields"),
        ({"weights.offset": [0.5, 0.5]}, "there twice"),
        ({"weights.offset": []}, "no values"),
        ({"weights.offset": {"low": 1, "high": 0}}, "no numbers lie between"),
        ({"weights.offset": {"low": 0, "high": 1, "log": True}}, "a low above 0"),
        ({}, "at least 1 item"),
    ],
)
def test_what_is_no_space(parameters, said):
    with pytest.raises(ValueError, match=said):
        space(**parameters)


def test_points_of_ranges():
    assert Range(low=1, high=5, step=2).points() == [1, 3, 5]
    assert Range(low=1, high=3).points() == [1, 2, 3]
    assert Range(low=0.0, high=0.3, step=0.1).points() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert Range(low=1, high=3).is_whole
    assert not Range(low=1.0, high=3).is_whole


@pytest.mark.parametrize(("name", "recipe"), [("two-bit", "w2"), ("w8a8", "w8a8")])
def test_a_shipped_space_holds_the_recipe_that_it_should_beat(name, recipe):
    one, written = find_space(name), find_recipe(recipe)
    values = one.values_of(written)
    assert one.recipe_of(values).recipe_id == written.recipe_id
    assert set(values) == set(one.parameters)
    other = Recipe.model_validate(written.model_dump() | {"kv_cache": {"format": "int4"}})
    assert one.values_of(other) is None


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_shipped_space_makes_sense_and_is_held(path):
    one, draw = find_space(path), random.Random(0)
    for _ in range(60):
        recipe = one.recipe_of({name: drawn(choices, draw) for name, choices in one.parameters.items()})
        assert one.recipe_of(one.values_of(recipe)).recipe_id == recipe.recipe_id


def drawn(choices, draw):
    if isinstance(choices, list):
        return draw.choice(choices)
    return draw.choice(choices.points()) if choices.step else draw.uniform(choices.low, choices.high)


@pytest.mark.parametrize(
    ("granularity", "factor", "holds"),
    [("g32", 0.9, True), ("g32", 1.1, True), ("g96", 1.0, False), ("g32", 0.95, False), ("g32", 1.2, False)],
)
def test_a_space_holds_what_its_values_can_say(granularity, factor, holds):
    one = space(
        **{
            "weights": [{"format": "int2"}, {"format": "int3", "symmetric": False}],
            "weights.granularity": ["g64", "g32"],
            "weights.scale_factor": {"low": 0.9, "high": 1.1, "step": 0.1},
        }
    )
    weights = {"format": "int3", "symmetric": False, "granularity": granularity, "scale_factor": factor}
    recipe = Recipe.model_validate({**RECIPE, "name": "hand", "weights": weights})
    found = one.values_of(recipe)
    assert (found is not None) == holds
    if holds:
        assert found["weights"] == {"format": "int3", "symmetric": False}
        assert found["weights.scale_factor"] == factor
        assert one.parameters["weights"][1] == {"format": "int3", "symmetric": False}  # a choice stays itself


def test_a_grid_is_every_combination():
    one = space(
        **{"weights.granularity": ["g32", "g64"], "weights.offset": {"low": 0.0, "high": 0.5, "step": 0.25}}
    )
    points = list(one.grid())
    assert len(points) == 6
    assert points[1] == {"weights.granularity": "g32", "weights.offset": 0.25}
    with pytest.raises(BitassayError, match="a range without a step"):
        space(**{"weights.offset": {"low": 0.0, "high": 0.5}}).grid()
    with pytest.raises(BitassayError, match="a grid of 1000001 recipes"):
        space(**{"learned.steps": {"low": 0, "high": 1_000_000}}).grid()


def test_find_space(tmp_path):
    with pytest.raises(BitassayError, match="no space is called 'two-bits'; the nearest are 'two-bit'"):
        find_space("two-bits")
    (tmp_path / "s.yaml").write_text("name: s\nrecipe: {}\nparameters: {a: 3}\n")
    with pytest.raises(BitassayError, match=r"s.yaml: not a space: parameters.a"):
        find_space(tmp_path / "s.yaml")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_hold_recipes(path):
    one = find_space(path)
    assert one.name == path.stem
    assert len(one.parameters) >= (3 if one.name == "loops" else 6)
    first = {name: c[0] if isinstance(c, list) else c.low for name, c in one.parameters.items()}
    assert isinstance(one.recipe_of(first), Recipe)

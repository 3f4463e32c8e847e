"""A solver of another package is a part of recipes: checked, in the id, run, saved and loaded."""

import pytest
import torch

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import PLUGINS, Recipe, find_recipe
from bitassay.quantization.runtime.model import quantization_of
from bitassay.quantization.solvers.registry import SOLVERS
from bitassay.testing.tiny import stories260k

FIELDS = {
    "name": "mine",
    "weights": {"format": "int4", "granularity": "g32", "scale": "mse"},
    "calibration": {"samples": 2, "tokens": 32},
}


@pytest.fixture(autouse=True)
def forgotten():
    """What a plug-in has registered is not there for other tests."""
    yield
    for registry in (PLUGINS, SOLVERS):
        registry._items.pop("shrink", None)


def test_a_part_of_another_package_is_in_the_recipe(example_plugin, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nweights: {format: int4, granularity: g32, scale: mse}\n"
        "calibration: {samples: 2, tokens: 32}\nshrink: {factor: 0.5}\n"
    )
    recipe = find_recipe(tmp_path / "mine.yaml")
    assert recipe.is_calibrated
    assert recipe.uses_calibrated_solver
    assert list(recipe.parts) == ["shrink"]
    assert recipe.to_yaml_dict()["shrink"] == {"factor": 0.5}
    assert Recipe.model_validate(recipe.to_yaml_dict()) == recipe
    others = [FIELDS, FIELDS | {"shrink": {}}, FIELDS | {"shrink": {"factor": 0.25}}]
    ids = {Recipe.model_validate(fields).recipe_id for fields in others}
    assert len(ids | {recipe.recipe_id}) == 4


def test_its_codes_are_made_saved_and_loaded(example_plugin, tmp_path):
    base = stories260k()
    plain = quantization_of(quantize(base, Recipe.model_validate(FIELDS)))
    model = quantize(base, Recipe.model_validate(FIELDS | {"shrink": {"factor": 0.5}}))
    name, tensor = next(iter(quantization_of(model).tensors.items()))  # a power of two scales the grid alone
    assert torch.allclose(tensor.dequantize(), plain.tensors[name].dequantize() / 2, rtol=1e-3)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert quantization_of(again).recipe == quantization_of(model).recipe


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"shrink": {"factor": 2}}, "less than or equal to 1"),
        ({"shrink": {"facto": 0.5}}, "not permitted"),
        ({"shrink": {}, "gptq": {}}, "shrink and gptq: one of them"),
        ({"shrink": {}, "weights": None}, "shrink: there are no weights"),
        ({"shrnk": {}}, "not permitted"),
    ],
)
def test_what_does_not_fit_is_refused(example_plugin, fields, why):
    with pytest.raises(ValueError, match=why):
        Recipe.model_validate(FIELDS | fields)


def test_without_the_package_the_field_is_unknown(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nweights: {format: int4}\nshrink: {factor: 0.5}\n")
    with pytest.raises(BitassayError, match="there is no field 'shrink'"):
        find_recipe(tmp_path / "mine.yaml")

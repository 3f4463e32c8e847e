"""A number format of another package: weights are rounded to it, saved and loaded."""

import pytest
import torch

from bitassay.engines.load import load
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import bits_per_weight, quantization_of

WEIGHTS = {"format": "int6", "granularity": "g32", "symmetric": False}


@pytest.fixture(autouse=True)
def forgotten():
    """What a plug-in has registered is not there for other tests."""
    yield
    FORMATS._items.pop("int6", None)


def test_weights_are_rounded_saved_and_loaded(example_plugin, stories, tmp_path):
    recipe = Recipe.model_validate({"name": "w6", "weights": WEIGHTS})
    model = quantize(stories, recipe)
    assert bits_per_weight(model) == pytest.approx(6 + (16 + 6) / 32, abs=0.2)
    name, tensor = next(iter(quantization_of(model).tensors.items()))
    weight = stories.get_submodule(name).weight
    assert 16 < tensor.codes().unique().numel() <= 64
    assert (tensor.dequantize() - weight).abs().max() <= tensor.scale.max()
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_without_the_package_the_format_is_unknown():
    with pytest.raises(ValueError, match="unknown format 'int6'"):
        Recipe.model_validate({"name": "w6", "weights": WEIGHTS})

import math

import pytest
import torch

from bitassay.models.walk import matrices
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.studies import quantize_time
from bitassay.studies.quantize_time import Duration, quantize_seconds
from bitassay.testing.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch):
    """Rates of a machine that is always the same."""
    monkeypatch.setattr(quantize_time, "matrix_peak", lambda name, *_: 1e9 if name == "float32" else 4e9)
    monkeypatch.setattr(quantize_time, "_rounded_a_second", lambda *_: 1e6)
    monkeypatch.setattr(quantize_time, "fast_in_bf16", lambda _: True)


def calibrated(samples, **parts):
    fields = {"weights": {"format": "int4", "granularity": "g32"}, **parts}
    return Recipe.model_validate(
        {"name": "r", "calibration": {"samples": samples, "tokens": 16}, "gptq": {}, **fields}
    )


def test_time_is_what_rounding_text_and_factorising_take(timed, monkeypatch):
    model = tiny_model("llama")
    weights = sum(view.numel() for view in matrices(model).values())
    assert quantize_seconds(model, find_recipe("w4"), CPU) == Duration(weights / 1e6, {"float32": 1e9}, 1e6)
    shapes = [view.shape for view in matrices(model).values()]
    hidden, wide = model.config.hidden_size, model.config.intermediate_size
    inputs = [hidden, hidden, hidden, wide] * len(model.model.layers)  # q k v, o, gate and up, down
    text = 2.5 * 2 * weights + sum(size**2 for size in inputs)
    once = sum(4 / 3 * size**3 for size in inputs) + sum(out * columns**2 for out, columns in shapes)
    for samples in (2, 7):
        found = quantize_seconds(model, calibrated(samples), CPU)
        assert found.seconds == pytest.approx(weights / 1e6 + (samples * 16 * text + once) / 1e9)
    learned = quantize_seconds(model, calibrated(2, learned={"steps": 3, "batch": 2}), CPU)
    without = quantize_seconds(model, calibrated(2), CPU)
    more = 2 * weights * 16 * (4 * 3 * 2 + 2 * 0) / 4e9
    assert learned.seconds - without.seconds == pytest.approx(more)
    monkeypatch.setattr(quantize_time, "fast_in_bf16", lambda _: False)
    slower = quantize_seconds(model, calibrated(2, learned={"steps": 3, "batch": 2}), CPU)
    assert slower.seconds - without.seconds == pytest.approx(4 * more)


def test_what_is_timed_is_the_recipes_own_rounding(monkeypatch):
    model, seen = tiny_model("mixtral"), []

    def counted(weight, scheme, name, old=quantize_time.quantize_tensor):
        seen.append((tuple(weight.shape), scheme.format))
        return old(weight, scheme, name)

    monkeypatch.setattr(quantize_time, "quantize_tensor", counted)
    for recipe, kind in (("w2", "int2"), ("w1", "binary")):
        found = quantize_seconds(model, find_recipe(recipe), CPU)
        assert math.isfinite(found.seconds)
        assert found.seconds > 0
        assert seen[-1] == ((256, 1024), kind)


def test_a_duration_says_what_it_rests_on():
    said = str(Duration(5400.0, {"float32": 8.1e10, "bfloat16": 2e11}, 5.3e6))
    assert said.startswith(
        "about 1.5 h, by what was timed on this machine just now: 81 GFLOP/s in float32 and 200 "
    )
    assert "5.3 million weights rounded a second" in said
    assert str(Duration(89.6, {"float32": 1e9}, 1e6)).startswith("about 90 s,")

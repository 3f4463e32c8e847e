"""Recipes with rounded inputs, smoothing and a cache in few bits, from the recipe to the model and back from a
folder."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import bitassay
from bitassay.errors import BitassayError
from bitassay.evaluation.divergence import window_logits
from bitassay.models.walk import walk
from bitassay.quantization.export.save import save
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.inputs.kv_cache import PackedCache, empty_cache
from bitassay.quantization.recipe.inputs import KvCache
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.linear import QuantizedLinear, RoundedInputLinear
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.testing.tiny import tiny_model

IDS = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
CALIBRATION = {"samples": 2, "tokens": 64}


def recipe(**parts) -> Recipe:
    return Recipe.model_validate({"name": "r", "weights": {"format": "int8"}} | parts)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.sample(5)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "part", [{}, {"symmetric": False}, {"format": "fp8_e4m3"}, {"format": "int16"}, {"format": "int6"}]
)
def test_fake_and_real_models_agree(architecture, part):
    base = tiny_model(architecture)
    fake = bitassay.quantize(base, recipe(activations=part))
    real = with_tensors(base, fake.quantization, packed=True)
    kinds = [type(module) for module in fake.modules()], [type(module) for module in real.modules()]
    count = len(walk(base).linears)
    assert (kinds[0].count(RoundedInputLinear), kinds[1].count(QuantizedLinear)) == (count, count)
    # A difference of one in fp32's last place may move an input to the next code, one step of 127.
    steps = {"int4": 7, "int6": 31}.get(part.get("format", ""), 127)
    assert (logits(fake) - logits(real)).norm() < 0.5 / steps * logits(fake).norm()
    assert not torch.equal(logits(fake), logits(bitassay.quantize(base, recipe())))


def test_int16_inputs_are_nearly_exact_and_fewer_bits_are_worse():
    base = tiny_model("llama")
    exact = logits(base)
    errors = [
        (logits(bitassay.quantize(base, recipe(weights=None, activations={"format": name}))) - exact).norm()
        for name in ("int16", "int8", "int6", "int4")
    ]
    assert errors[0] < 1e-3 * exact.norm()
    assert errors == sorted(errors)


def test_weights_may_stay_and_the_base_does():
    base = tiny_model("qwen2")
    before = logits(base)
    model = bitassay.quantize(base, recipe(weights=None, activations={}))
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(base), before)
    name = "model.layers.0.self_attn.q_proj"
    rounded, own = model.get_submodule(name), base.get_submodule(name)
    assert rounded.weight is own.weight
    assert rounded.bias is own.bias


def test_static_scales_come_from_calibration_text(stories):
    static = {"match": "*.down_proj", "inputs": {"scale": "kl", "outliers": {"sigma": 20}}}
    part = {"overrides": [static]}
    model = bitassay.quantize(stories, recipe(activations=part, calibration=CALIBRATION))
    inputs = model.quantization.inputs
    assert set(inputs) == set(walk(stories).linears)
    scales = [inputs[f"model.layers.{layer}.mlp.down_proj"].scale for layer in range(5)]
    assert None not in scales
    assert len(set(scales)) == 5
    distance = (logits(model) - logits(stories)).norm() / logits(stories).norm()
    assert 1e-4 < distance < 0.3


def test_smoothing_is_done_before_the_weights_are_rounded(stories):
    parts = {"activations": {}, "calibration": CALIBRATION, "smoothing": {"method": "smoothquant"}}
    model = bitassay.quantize(stories, recipe(**parts))
    gains = {name for name in model.quantization.parameters if name.endswith("layernorm.weight")}
    assert len(gains) == 2 * len(stories.model.layers)
    assert (logits(model) - logits(stories)).norm() < 0.2 * logits(stories).norm()
    assert stories.model.norm.weight is model.model.norm.weight


def test_the_cache_of_a_recipe_is_the_models():
    base = tiny_model("llama")
    model = bitassay.quantize(base, recipe(kv_cache={"format": "int4"}))
    plain = bitassay.quantize(base, recipe())
    assert isinstance(empty_cache(model), PackedCache)
    assert not torch.equal(logits(model), logits(plain))
    assert not torch.equal(window_logits(model, IDS[0]), window_logits(plain, IDS[0]))
    with torch.inference_mode():
        read = plain(IDS, past_key_values=PackedCache(plain.config, KvCache(format="int4"))).logits
    assert torch.equal(logits(model), read)


PARTS = {
    "dynamic": {"activations": {"format": "int8", "symmetric": False}},
    "static": {
        "activations": {"scale": "percentile", "outliers": {"percentile": 90}},
        "calibration": CALIBRATION,
    },
    "factor": {"activations": {"scale_factor": 0.9}},
    "cache": {"kv_cache": {"format": "int4", "granularity": "g4"}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_what_is_saved_comes_back(stories, tmp_path, parts):
    model = bitassay.quantize(stories, recipe(**parts))
    assert save(model, tmp_path / "saved").layout == "bitassay"
    loaded = bitassay.load(str(tmp_path / "saved"), dtype=torch.float32)
    assert loaded.quantization.inputs == model.quantization.inputs
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda inputs: inputs.pop("model.layers.0.mlp.up_proj"), "not those of the recipe"),
        (
            lambda inputs: inputs.update({"model.layers.9.mlp.up_proj": {"format": "int8"}}),
            "not those of the recipe",
        ),
        (
            lambda inputs: inputs["model.layers.0.mlp.up_proj"].update(format="int4"),
            "not those of the recipe",
        ),
        (lambda inputs: inputs["model.layers.0.mlp.up_proj"].update(scale=-1.0), "a scale of -1.0"),
        (lambda inputs: inputs["model.layers.0.mlp.up_proj"].update(outliers=[5000]), "no column 5000"),
        (lambda inputs: inputs["model.layers.0.mlp.up_proj"].update(more=1), "unexpected keyword"),
    ],
)
def test_a_card_that_was_changed_is_refused(stories, tmp_path, change, says):
    save(bitassay.quantize(stories, recipe(activations={})), tmp_path / "saved")
    path = tmp_path / "saved" / "bitassay.json"
    card = json.loads(path.read_text())
    change(card["inputs"])
    path.write_text(json.dumps(card))
    with pytest.raises(BitassayError, match=says):
        bitassay.load(str(tmp_path / "saved"))


def test_roundings_survive_json_and_odd_ones_are_refused():
    adapter = TypeAdapter(InputRounding)
    rounding = InputRounding("int8", False, 0.25, 3, (1, 7))
    assert adapter.validate_python(json.loads(json.dumps(asdict(rounding)))) == rounding
    for wrong in (
        {"format": "int5"},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"zero_point": None},
        {"symmetric": True},
        {"zero_point": 256},
        {"outliers": (7, 1)},
        {"outliers": (-1,)},
        {"outliers": (1, 1)},
    ):
        with pytest.raises(ValueError, match=r"unknown|scale of|zero point|outlier"):
            replace(rounding, **wrong)
        with pytest.raises(ValidationError):
            adapter.validate_python(asdict(rounding) | wrong)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"weights": {"format": "fp8_e4m3"}, "activations": {}}, "no device multiplies"),
        ({"smoothing": {"method": "smoothquant"}}, "no activations are rounded"),
        ({"weights": None, "smoothing": {"method": "awq"}}, "there are none"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, says):
    with pytest.raises(ValidationError, match=says):
        recipe(**parts)
    assert recipe(weights={"format": "fp8_e4m3"}, activations={"format": "fp8_e5m2"})


def test_a_model_moves_with_its_roundings():
    model = bitassay.quantize(tiny_model("llama"), recipe(activations={}, kv_cache={}), packed=True)
    moved = model.to(torch.bfloat16)
    assert logits(moved).isfinite().all()
    assert isinstance(moved.quantization, Quantization)

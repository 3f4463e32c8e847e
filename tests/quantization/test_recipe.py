import json

import pytest
import torch
import yaml
from pydantic import ValidationError

import bitassay
from bitassay.errors import BitassayError
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import (
    Recipe,
    WeightScheme,
    find_recipe,
    read_recipe,
    shipped_recipes,
)
from bitassay.record.files import YAML_BYTES
from bitassay.testing.tiny import stories260k, tiny_model

W4 = {"format": "int4", "granularity": "g64"}


def test_the_shipped_recipes_are_whole():
    shipped = shipped_recipes()
    assert {"w8", "fp8", "w4", "w3", "w2", "w1.58", "w1"} <= set(shipped)
    for name, recipe in shipped.items():
        assert recipe.name == name
        assert recipe.description
        assert find_recipe(name) == recipe
    assert shipped.pop("gguf-q1_0").recipe_id == shipped["best-1bit"].recipe_id  # a name of its type
    assert len({recipe.recipe_id for recipe in shipped.values()}) == len(shipped)


BEST = {
    name: recipe for name, recipe in shipped_recipes().items() if name.startswith("best-")
}  # what calibration finds best at each number of bits


def test_there_is_a_best_recipe_at_every_number_of_bits():
    assert set(BEST) == {f"best-{bits}bit" for bits in ("4", "3", "2", "1.58", "1")}
    assert all(recipe.is_calibrated for recipe in BEST.values())


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", BEST)
def test_a_best_recipe_runs_and_is_saved(name, tmp_path):
    changes = {
        "calibration": Calibration(samples=8, tokens=48),
        "learned": BEST[name].learned.model_copy(update={"steps": 2}),
        "tune": BEST[name].tune.model_copy(update={"steps": 2}),
    }
    base = stories260k()
    quantized = bitassay.quantize(base, BEST[name].model_copy(update=changes))
    save(quantized, tmp_path / "folder")
    tokens = torch.arange(1, 60)[None]
    assert torch.equal(bitassay.load(tmp_path / "folder")(tokens).logits, quantized(tokens).logits)
    assert torch.equal(
        bitassay.load(tmp_path / "folder", packed=True)(tokens).logits, quantized(tokens).logits
    )


@pytest.mark.parametrize("name", ["portable-4bit", "portable-3bit", "portable-2bit", "best-1.58bit"])
def test_what_plain_transformers_is_said_to_load_is_written_for_it(name):
    assert plan_export(stories260k(), find_recipe(name)).layout == "compressed-tensors"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v2"])
def test_a_best_recipe_takes_a_mixture(name, architecture):
    changes = {
        "calibration": Calibration(samples=4, tokens=32),
        "learned": BEST[name].learned.model_copy(update={"steps": 2}),
        "tune": BEST[name].tune.model_copy(update={"steps": 2}),
    }
    model = bitassay.quantize(tiny_model(architecture), BEST[name].model_copy(update=changes))
    experts = [own for own in model.quantization.tensors if ".experts." in own]
    assert experts
    assert model(torch.arange(1, 40)[None]).logits.isfinite().all()


def test_the_id_is_that_of_the_change_not_of_its_name():
    recipe = Recipe(name="a", weights=W4)
    assert Recipe(name="b", description="other", weights=W4).recipe_id == recipe.recipe_id
    others = [
        {"weights": W4 | {"granularity": "g32"}},
        {"weights": W4 | {"symmetric": False}},
        {"weights": W4 | {"scale": "mse"}},
        {"weights": W4 | {"scale_dtype": "float32"}},
        {"weights": W4 | {"format": "int3"}},
        {"weights": None},
        {"weights": W4, "overrides": [{"match": "*.q_proj", "weights": None}]},
    ]
    assert (
        len({Recipe(name="a", **other).recipe_id for other in others} | {recipe.recipe_id}) == len(others) + 1
    )


LEFT_OUT = {
    "name": "left-out",
    "weights": {"format": "int2"},
    "overrides": [{"match": "*.0.*", "weights": None}],
    "activations": {"format": "int8", "overrides": [{"match": "*.1.*", "inputs": None}]},
    "replication": {"differ": "offset", "how": "parallel", "layers": {"by": "kl"}},
}


def test_the_content_of_a_recipe_makes_the_same_one():
    for recipe in (*shipped_recipes().values(), Recipe.model_validate(LEFT_OUT)):
        content = recipe.to_yaml_dict()
        assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(content))) == recipe
    assert content["overrides"] == [{"match": "*.0.*", "weights": None}]
    assert not {"gptq", "calibration"} & content.keys()


def test_options_that_are_idle_change_no_id():
    """An option that came later leaves the ids of older recipes as they were."""
    plain = WeightScheme(format="int4", granularity="g64")
    assert set(plain.model_dump()) == {"format", "granularity", "symmetric", "scale", "scale_dtype"}
    said = W4 | {"offset": 0.0, "rounding": "nearest"}
    assert Recipe(name="a", weights=said).recipe_id == Recipe(name="a", weights=W4).recipe_id
    shifted = WeightScheme(**W4, offset=0.5, noise=0.1, seed=3)
    assert shifted.model_dump()["offset"] == 0.5
    assert WeightScheme.model_validate(shifted.model_dump(mode="json")) == shifted


def test_the_first_matching_override_wins():
    recipe = Recipe(
        name="mixed",
        weights=W4,
        overrides=[
            {"match": "*.0.mlp.*", "weights": None},
            {"match": "*.down_proj", "weights": {"format": "int8"}},
        ],
    )
    assert recipe.scheme_for("layers.0.mlp.down_proj") is None
    assert recipe.scheme_for("layers.1.mlp.down_proj").format == "int8"
    assert recipe.scheme_for("layers.1.mlp.up_proj").format == "int4"


def test_scales_are_searched_below_four_bits_unless_told_otherwise():
    assert WeightScheme(format="int3").scale == "mse"
    assert WeightScheme(format="int4").scale == "absmax"
    assert WeightScheme(format="int2", scale="absmax").scale == "absmax"


@pytest.mark.parametrize("scheme", [
    {"format": "int7"}, {"format": "int4", "zero_point": "minimum"}, {"format": "int4", "granularity": "g0"}, {"format": "int4", "granularity": "row"}, {"format": "int4", "granularity": "g-1"},
    {"format": "fp8_e4m3", "symmetric": False}, {"format": "ternary", "symmetric": False}, {"format": "binary", "scale": "absmax"},
    {"format": "int4", "restricted": True, "symmetric": False}, {"format": "ternary", "restricted": True},
    {"format": "int4", "percentile": 99}, {"format": "int4", "scale": "percentile", "percentile": 50}, {"format": "binary", "scale": "percentile"},
    {"format": "int4", "zero_point": "free"}, {"format": "binary", "symmetric": False, "zero_point": "free"},
    {"format": "int4", "symmetric": False, "zero_point": "searched", "scale": "absmax"}, {"format": "ternary", "offset": 0.5},
    {"format": "int2", "zero_point": "middle"}, {"format": "int4", "symmetric": False, "zero_point": "middle"},
    {"format": "int2", "symmetric": False, "zero_point": "middle", "offset": 0.5},
    {"format": "int4", "offset": 1.0}, {"format": "int4", "offset": 0.5, "restricted": True}, {"format": "fp8_e4m3", "noise": 0.1},
    {"format": "int2", "symmetric": False, "offset": 0.5, "zero_point": "free"}, {"format": "fp8_e4m3", "rounding": "stochastic"},
    {"format": "int4", "seed": 1}, {"format": "int4", "rounding": "feedback", "seed": 1}, {"format": "int4", "noise": -0.1},
    {"format": "int4", "scale": "best"}, {"format": "int4", "scale_dtype": "float8"}, {"format": "int4", "groups": 64}, {},
])  # fmt: skip
def test_schemes_that_make_no_sense_are_refused(scheme):
    with pytest.raises(ValidationError):
        WeightScheme(**scheme)


@pytest.mark.parametrize(("text", "message"), [
    ("name: x\nweights: {format: int9}", "int8"),
    ("name: x\nweights: {format: int4}\nextra: 1", "extra"),
    ("weights: {format: int4}", "name"),
    ("name: a/b\nweights: null", "name"),
    ("[1, 2]", "not a recipe"),
    ("", "not a recipe"),
    ("name: [", "not valid YAML"),
    ("name: 2020-13-01\nweights: null", "not valid YAML"),
    ("name: " + "1" * 5000, "not valid YAML"),
    ("name: !!int ''", "not valid YAML"),
    ("name: !!bool x", "not valid YAML"),
    ("name: !!timestamp x", "not valid YAML"),
    ("1: 2", "not a recipe"),
    ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
])  # fmt: skip
def test_defects_of_a_file_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BitassayError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_files_that_are_missing_or_too_large(tmp_path):
    with pytest.raises(BitassayError, match="No such file"):
        find_recipe(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (YAML_BYTES + 1))
    with pytest.raises(BitassayError, match="bytes"):
        find_recipe(tmp_path / "big.yaml")


@pytest.mark.parametrize("name", ["w44", "../w4", "/etc/passwd"])
def test_unknown_names_suggest_the_nearest(name):
    with pytest.raises(BitassayError, match="'w4'"):
        find_recipe(name)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weights": None, "gptq": {}}, "no weights to round"),
        (
            {"weights": {"format": "int4", "rounding": "stochastic"}, "gptq": {}},
            "rounding and noise have no say",
        ),
        ({"weights": {"format": "fp8_e4m3"}, "learned": {}}, "no common step"),
        ({"weights": {"format": "int4", "granularity": "tensor"}, "tune": {}}, "a scale for each row"),
        (
            {"weights": {"format": "int4"}, "tune": {"codes": 0, "scales": 0, "norms": 0}},
            "learning rates are zero",
        ),
    ],
)
def test_combinations_that_make_no_sense(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        Recipe(name="x", **fields)


def test_the_id_covers_calibration_text_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "notes.txt"
    text_of = {"corpus": "notes.txt", "samples": 3, "tokens": 16}
    content = {"name": "mine", "weights": W4, "gptq": {}, "calibration": text_of}
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    with pytest.raises(BitassayError, match=r"mine\.yaml: .*calibration\.corpus: .*notes\.txt: No such file"):
        read_recipe(tmp_path / "mine.yaml")
    text.write_text("Once upon a time there was a dog. " * 20)
    recipe = Recipe.model_validate(content)
    assert Recipe.model_validate(content).recipe_id == recipe.recipe_id
    model = stories260k()
    tokens = calibration_tokens(model, recipe.calibration)
    assert tokens.shape == (3, 16)
    assert "dog" in model.tokenizer.decode(tokens[0])
    text.write_text("Another text. " * 50)
    assert Recipe.model_validate(content).recipe_id != recipe.recipe_id
    with pytest.raises(BitassayError, match="means another text"):
        calibration_tokens(model, recipe.calibration)
    assert Recipe.model_validate(recipe.model_dump()) == recipe  # read back without looking at the file

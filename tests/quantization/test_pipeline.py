"""Calibrated recipes on a small trained model: each ingredient helps, an interrupted run goes on, and what
cannot be calibrated is refused."""

import json
import platform
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError
from bitassay.evaluation.quality import evaluate
from bitassay.models.walk import decoder_layers, matrices
from bitassay.quantization import pipeline, work
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import (
    bits_per_weight,
    copy_sharing_parameters,
    quantization_of,
    with_tensors,
)
from bitassay.quantization.solvers import distillation, kept, layers, layerwise, tune
from bitassay.quantization.solvers.layerwise import (
    first_inputs,
    hessian_of,
    input_groups,
    products_in,
    run_layer,
)
from bitassay.testing.tiny import stories260k, tiny_model

W2 = {"format": "int2", "granularity": "g32", "symmetric": False}
CALIBRATION = {"samples": 16, "tokens": 64}
PROTOCOL = Protocol(window_tokens=256, windows=3)
RECIPES = {
    "nearest": {},
    "gptq": {"gptq": {"order": "natural"}},
    "learned": {"gptq": {"order": "natural"}, "learned": {"steps": 12}},
    "tune": {"gptq": {"order": "natural"}, "tune": {"steps": 12, "codes": 1e-2}},
}


def recipe(name, **changes):
    return Recipe(**{"name": name, "weights": W2, "calibration": CALIBRATION} | RECIPES[name] | changes)


@pytest.fixture(scope="module")
def base():
    return stories260k()


@pytest.fixture(scope="module")
def made(base):
    """A function name -> the model of that recipe, made once; tests must not change it."""
    return cache(lambda name: quantize(base, recipe(name)))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The work folder of `gptq`."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    quantize(base, recipe("gptq"), work=folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def divergences(base, made):
    plain = quantize(base, Recipe(name="plain", weights=W2))
    models = {"plain": plain} | {name: made(name) for name in RECIPES}
    bits = {bits_per_weight(model) for model in models.values()}
    assert len(bits) == 1
    return {
        name: evaluate(model, against=base, protocol=PROTOCOL).quality.kl_mean
        for name, model in models.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("better", "worse"), [("gptq", "nearest"), ("learned", "gptq"), ("tune", "gptq")])
def test_each_ingredient_helps_at_equal_bits(divergences, better, worse):
    assert divergences[better] < 0.95 * divergences[worse]


def test_the_base_model_stays_as_it_is(base):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    changed = quantize(base, recipe("tune"))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    norms = quantization_of(changed).parameters
    assert len(norms) == 2 * len(decoder_layers(base)) + 1
    assert any(not torch.equal(value, before[name]) for name, value in norms.items())


def test_learning_that_makes_a_layer_worse_is_undone(base, made):
    said = []
    hasty = recipe("learned", learned={"steps": 2, "codes": 5.0})
    tensors = quantization_of(quantize(base, hasty, progress=lambda text, *_: said.append(text))).tensors
    assert len([text for text in said if text.endswith("and was undone")]) == len(decoder_layers(base))
    for name, tensor in quantization_of(made("gptq")).tensors.items():
        assert torch.equal(tensor.dequantize(), tensors[name].dequantize())


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "at"), [("gptq", 0), ("gptq", 4), ("learned", 2)])
def test_an_interrupted_run_goes_on(base, made, tmp_path, monkeypatch, name, at):
    wanted = made(name)
    finished, write = [], layers.write_part

    def write_some(folder, part, *tensors):
        if part == f"layer-{at:04d}":
            raise KeyboardInterrupt
        finished.append(part)
        write(folder, part, *tensors)

    monkeypatch.setattr(layers, "write_part", write_some)
    with pytest.raises(KeyboardInterrupt):
        quantize(base, recipe(name), work=tmp_path / "work")
    monkeypatch.undo()
    assert len(finished) == at
    monkeypatch.setattr(layers, "write_part", lambda folder, part, *tensors: finished.append(part))
    found = quantize(base, recipe(name), work=tmp_path / "work")
    assert finished == [f"layer-{index:04d}" for index in range(len(decoder_layers(base)))]
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.slow
def test_interrupted_tuning_goes_on(base, made, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "KEEP_STEPS", 4)
    wanted = made("tune")
    seen = []

    def stop(what, done=0, total=0):
        if what.startswith("tuning"):
            seen.append(done)
            if done == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(base, recipe("tune"), work=tmp_path, progress=stop)
    seen.clear()
    monkeypatch.setattr(layers, "run_layer", lambda *_: 1 / 0)  # all layers are finished: none is run again
    found = quantize(
        base, recipe("tune"), work=tmp_path, progress=lambda what, done=0, total=0: seen.append(what)
    )
    assert sum(what.startswith("tuning") for what in seen) == 12 - 4
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_tuning_learns_from_what_the_base_model_writes(base, tmp_path, monkeypatch):
    spec = recipe("tune", tune={"steps": 8, "generated": 16})

    def stop(what, done=0, total=0):
        if what.startswith("tuning"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(base, spec, work=tmp_path, progress=stop)
    written = load_file(tmp_path / "parts/written-0000.safetensors")
    assert written["tokens"].shape == (16, 64)
    assert written["states"].shape == (16, 64, base.config.hidden_size)
    monkeypatch.setattr(distillation, "continued", lambda *_: 1 / 0)
    found = quantize(base, spec, work=tmp_path)
    monkeypatch.undo()
    for key, value in quantize(base, spec).state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.sample(1)
@pytest.mark.parametrize("changes", [{}, {"activations": {"scale": "absmax"}}, {"rotation": {}}])
def test_a_finished_work_folder_holds_the_result_alone(base, tmp_path, monkeypatch, changes):
    wanted = quantize(base, recipe("tune", **changes), work=tmp_path / "work")
    assert {path.name for path in (tmp_path / "work/parts").iterdir()} == {
        "inputs.json", "passes.json", "result.json", "result.safetensors",
    }  # fmt: skip
    monkeypatch.setattr(pipeline, "quantize_calibrated", lambda *_: 1 / 0)
    found = quantize(base, recipe("tune", **changes), work=tmp_path / "work")
    assert quantization_of(found).inputs == quantization_of(wanted).inputs
    tokens = torch.arange(1, 60)[None]
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)
    assert bits_per_weight(found) == bits_per_weight(wanted)


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", ["shape", "missing", "scheme", "card", "matrix", "inputs"])
def test_a_damaged_result_is_refused(base, copied, damage):
    file, card = copied / "parts/result.safetensors", copied / "parts/result.json"
    parts = load_file(file)
    name = next(iter(parts))
    if damage == "scheme":
        card.write_text(card.read_text().replace("int2", "int9"))
    elif damage == "card":
        card.unlink()
    elif damage == "matrix":
        said = json.loads(card.read_text())
        said.pop(next(iter(said)))
        card.write_text(json.dumps(said))
    elif damage == "inputs":
        (copied / "parts/inputs.json").write_text('{"x": {"format": "int5"}}')
    elif damage == "shape":
        save_file(parts | {name: parts[name][..., 1:].clone()}, file)
    else:
        save_file({key: value for key, value in parts.items() if key != name}, file)
    with pytest.raises(BitassayError, match="inputs" if damage == "inputs" else "result"):
        quantize(base, recipe("gptq"), work=copied)


def test_a_calibrated_recipe_is_run_once_in_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path))
    half = stories260k(dtype="bfloat16")
    first = quantization_of(pipeline.quantize_cached(half, recipe("gptq")))
    monkeypatch.setattr(pipeline, "quantize_calibrated", lambda *_: 1 / 0)
    again = quantization_of(pipeline.quantize_cached(stories260k(), recipe("gptq")))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.dequantize(), again.tensors[name].dequantize())
    with monkeypatch.context() as patched:
        patched.setattr(
            pipeline, "load_checkpoint", lambda *_, **__: 1 / 0
        )  # what is finished needs no second model
        pipeline.quantize_cached(half, recipe("gptq"))
    monkeypatch.setattr(pipeline, "code_digest", lambda: "of another version")
    with pytest.raises(ZeroDivisionError):
        pipeline.quantize_cached(half, recipe("gptq"))


AFTER_THE_CODES = {
    "fitted": {"replication": {"coefficients": "fitted"}},
    "chosen": {"replication": {"layers": {"by": "kl"}, "coefficients": [1, 0.1]}},
    "inputs": {"activations": {"format": "int8", "scale": "absmax"}},
    "grids": {
        "activations": {"format": "int4"},
        "replication": {"how": "parallel", "of": "linear", "differ": "inputs"},
    },
    "cache": {"kv_cache": {"format": "int8"}},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("parts", AFTER_THE_CODES.values(), ids=AFTER_THE_CODES)
def test_codes_are_made_once_whatever_comes_after_them(base, tmp_path, monkeypatch, parts):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path))
    few = {"overrides": [{"match": "model.layers.[1-4].*", "weights": None}], "rotation": {}}
    codes = Recipe.model_validate(recipe("gptq").to_yaml_dict() | few)
    other = Recipe.model_validate(codes.to_yaml_dict() | parts | {"name": "other"})
    wanted = quantize(base, other)
    assert codes.recipe_id == other.without_postprocessing.recipe_id != other.recipe_id
    pipeline.quantize_cached(base, codes)
    monkeypatch.setattr(pipeline, "quantize_calibrated", lambda *_: 1 / 0)
    found = pipeline.quantize_cached(base, other)
    assert quantization_of(found).inputs == quantization_of(wanted).inputs
    assert quantization_of(found).passes == quantization_of(wanted).passes
    tokens = torch.arange(1, 60)[None]
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)


@pytest.mark.parametrize(
    "parts",
    [
        {"replication": {"how": "parallel", "of": "linear", "differ": "residual"}},
        {"smoothing": {"method": "smoothquant"}, "activations": {"format": "int8"}},
    ],
    ids=["residual", "smoothquant"],
)
def test_codes_are_not_shared_where_they_differ(parts):
    other = Recipe.model_validate(recipe("gptq").to_yaml_dict() | parts)
    assert other.without_postprocessing.recipe_id == other.recipe_id


def test_what_is_kept_belongs_to_the_code_that_made_it(monkeypatch):
    read, real = [], Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: read.append(path.as_posix()) or real(path, *a, **k)
    )
    before = work.code_digest()
    for name in (
        "quantization/solvers/gptq.py",
        "quantization/transforms/rotation.py",
        "quantization/replication/layer_copies.py",
        "quantization/replication/fit.py",
    ):
        assert any(path.endswith(name) for path in read), name
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: real(path) + "#" * (path.name == "fit.py"))
    assert work.code_digest() != before


def test_two_at_work_in_one_folder_take_turns(base, copied):
    with pipeline.locked(copied, lambda *_: None):
        seen = []

        def waiting(what, *_):
            seen.append(what)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(base, recipe("gptq"), work=copied, progress=waiting)
        assert seen[0].startswith("waiting for another process")
    quantize(base, recipe("gptq"), work=copied)


def test_a_work_folder_belongs_to_one_recipe(base, copied):
    with pytest.raises(BitassayError, match="another plan"):
        quantize(base, recipe("nearest"), work=copied)


def test_overrides_hold_while_calibrating(base):
    overrides = (
        {"match": "model.layers.0.*", "weights": None},
        {"match": "*.down_proj", "weights": {"format": "int8"}},
    )
    found = quantize(base, recipe("gptq", overrides=overrides))
    tensors = quantization_of(found).tensors
    assert {t.scheme.format for n, t in tensors.items() if n.endswith("down_proj")} == {"int8"}
    assert not any(name.startswith("model.layers.0.") for name in tensors)


@pytest.mark.parametrize(("scale", "runs"), [("absmax", 0), ("mse", 1)])
def test_text_that_has_no_say_in_rounding_is_not_run_through_the_layers(base, monkeypatch, scale, runs):
    real, seen = pipeline.quantize_calibrated, []
    monkeypatch.setattr(pipeline, "quantize_calibrated", lambda *given: seen.append(1) or real(*given))
    weights = {"format": "int8", "scale": scale}
    smooth = Recipe.model_validate(
        {
            "name": "smooth",
            "weights": weights,
            "smoothing": {"method": "smoothquant"},
            "activations": {},
            "calibration": CALIBRATION,
        }
    )
    made = quantize(base, smooth).quantization
    assert len(seen) == runs
    monkeypatch.setattr(Recipe, "uses_calibrated_solver", True)  # as if it had: the same codes
    again = quantize(base, smooth).quantization
    assert all(
        torch.equal(one.dequantize(), again.tensors[name].dequantize()) for name, one in made.tensors.items()
    )


def test_text_in_bfloat16_changes_little(base, made, monkeypatch):
    monkeypatch.setattr(layerwise, "fast_in_bf16", lambda _: True)
    exact = made("gptq")
    short = quantize(base, recipe("gptq", calibration=CALIBRATION | {"precision": "bfloat16"}))
    pairs = zip(exact.quantization.tensors.values(), short.quantization.tensors.values(), strict=True)
    apart = [(one.dequantize() - other.dequantize()).norm() / one.dequantize().norm() for one, other in pairs]
    assert 0 < max(apart) < 0.5
    found = [evaluate(one, against=base, protocol=PROTOCOL).quality.kl_mean for one in (exact, short)]
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_statistics_stay_in_float32(monkeypatch):
    monkeypatch.setattr(layerwise, "fast_in_bf16", lambda _: True)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with products_in("bfloat16", x.device):
        found = hessian_of(x)
        assert (x.T @ x).dtype == torch.bfloat16
    assert torch.equal(found, hessian_of(x))
    monkeypatch.setattr(layerwise, "fast_in_bf16", lambda _: False)
    with products_in("bfloat16", x.device):
        assert (x.T @ x).dtype == torch.float32


def test_learning_in_either_precision(monkeypatch):
    said: dict[bool, list[str]] = {True: [], False: []}
    for has_units, lines in said.items():
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_units=has_units: has_units)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        few = {"samples": 4, "tokens": 32}
        short = recipe("learned", calibration=few, learned={"steps": 2}, tune={"steps": 1})
        small = tiny_model("llama")
        quantize(small, short, progress=lambda line, *_, lines=lines: lines.append(line))
    losses = [
        [float(each) for each in re.findall(r"(?:KL|->) ([\d.]+)", " ".join(lines))]
        for lines in said.values()
    ]
    assert len(losses[0]) == 4  # of three layers and of the model
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_linears_that_read_the_same_tensor_are_one_group(base):
    layer = decoder_layers(base)[0]
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    tokens = torch.arange(20)[None] + 5
    hidden, arguments = first_inputs(base, tokens)
    groups = input_groups(layer, hidden, arguments[0], linears)
    words = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    assert words == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_layer_by_layer_is_the_model(architecture):
    model = tiny_model(architecture)
    tokens = torch.randint(3, 500, (20, 24), generator=torch.Generator().manual_seed(0))
    hidden, arguments = first_inputs(model, tokens)
    for layer, own in zip(decoder_layers(model), arguments, strict=True):
        hidden = run_layer(layer, hidden, own)
    wanted = model.get_decoder()(tokens).last_hidden_state
    assert torch.allclose(model.get_decoder().norm(hidden), wanted, atol=1e-5)


def test_nan_weights_are_named(base):
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BitassayError, match=r"model\.layers\.1\.mlp\.up_proj: NaN"):
        quantize(broken, recipe("gptq"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["nearest", "learned", "tune"])
@pytest.mark.parametrize(
    "rotation",
    [{"kind": "hadamard"}, {"r1": "online", "r2": False, "r4": True, "without_hadamard": "orthogonal"}],
    ids=["folded", "online"],
)
def test_rotated_recipes_keep_what_the_model_says(base, name, rotation):
    """With eight bits next to nothing is lost, whatever the basis that codes, norms and head are in."""
    weights = {"format": "int8", "granularity": "g32"}
    found = quantize(
        base, recipe(name, weights=weights, rotation=rotation, calibration={"samples": 4, "tokens": 64})
    )
    packed = with_tensors(base, quantization_of(found), packed=True)
    for model in (found, packed):
        assert evaluate(model, against=base, protocol=PROTOCOL).quality.kl_mean < 5e-3


def test_low_rank_factors_bring_the_output_closer(base, made):
    plain, helped = made("nearest"), quantize(base, recipe("nearest", low_rank={"rank": 8}))
    kl = [evaluate(model, against=base, protocol=PROTOCOL).quality.kl_mean for model in (plain, helped)]
    assert kl[1] < kl[0]
    assert bits_per_weight(helped) > bits_per_weight(plain)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["learned", "tune"])
def test_learning_keeps_the_low_rank_factors(base, made, name):
    found = quantization_of(quantize(base, recipe(name, low_rank={"rank": 4})))
    assert all(tensor.low_rank.a.shape[1] == 4 for tensor in found.tensors.values())
    kl = evaluate(with_tensors(base, found), against=base, protocol=PROTOCOL).quality.kl_mean
    assert kl < evaluate(made("nearest"), against=base, protocol=PROTOCOL).quality.kl_mean


def test_experts_are_calibrated_too():
    model = tiny_model("qwen3_moe")
    found = quantize(model, recipe("gptq", calibration={"samples": 32, "tokens": 128}))
    names = [name for name in quantization_of(found).tensors if ".experts." in name]
    assert len(names) == 3 * 2 * 4
    nearest = quantize(model, Recipe(name="plain", weights=W2))
    tokens = torch.randint(3, 500, (4, 48), generator=torch.Generator().manual_seed(0))
    errors = [(m(tokens).logits - model(tokens).logits).square().mean().item() for m in (found, nearest)]
    assert errors[0] < errors[1]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["learned", "tune"])
def test_learning_moves_the_linears_of_a_mixture_and_leaves_its_experts(name):
    model, said = tiny_model("qwen3_moe"), []
    gptq, found = (
        quantization_of(quantize(model, recipe(one), progress=lambda what, *_: said.append(what))).tensors
        for one in ("gptq", name)
    )
    here = [one for one in found if ".layers.0." in one]
    changed = {one for one in here if not torch.equal(found[one].dequantize(), gptq[one].dequantize())}
    assert changed
    assert not any(".experts." in one for one in changed)
    assert any("24 matrices of experts stay" in what for what in said)
    only_experts = [{"match": "*.self_attn.*", "weights": None}]
    with pytest.raises(BitassayError, match="only experts are quantized"):
        quantize(model, recipe(name, overrides=only_experts))


@pytest.mark.slow
def test_without_tuning_no_unrounded_weight_outlives_its_layer(base):
    tokens = pipeline.calibration_tokens(base, recipe("gptq").calibration)
    schemes = {name: recipe("gptq").scheme_for(name) for name in matrices(base)}
    for name, has_latent in (("gptq", False), ("learned", False), ("tune", True)):
        draft = copy_sharing_parameters(base)
        found = layers.quantize_layers(work.WorkingCopy(base, recipe(name), draft, schemes, tokens))
        assert all((solved.unrounded is not None) is has_latent for solved in found.values()), name


@pytest.mark.slow
def test_no_unrounded_weight_of_an_expert_outlives_its_layer():
    model, spec = tiny_model("qwen3_moe"), recipe("tune")
    tokens = pipeline.calibration_tokens(model, spec.calibration)
    schemes = {name: spec.scheme_for(name) for name in matrices(model)}
    draft = copy_sharing_parameters(model)
    found = layers.quantize_layers(work.WorkingCopy(model, spec, draft, schemes, tokens))
    latent = {name for name, solved in found.items() if solved.unrounded is not None}
    assert latent == {name for name in schemes if ".experts." not in name}


def test_tuning_is_one_stage_with_the_mean_loss_now_and_then(base, monkeypatch):
    monkeypatch.setattr(tune, "SAID_STEPS", 5)
    said = []
    quantize(base, recipe("tune"), progress=lambda *report: said.append(report))
    stage = [report for report in said if report[0].startswith("tuning")]
    assert stage == [("tuning by tune", step, 12) for step in range(1, 13)]
    losses = [what for what, *rest in said if what.startswith("step ")]
    assert [what.split(":")[0] for what in losses] == ["step 5", "step 10", "step 12"]
    assert losses[-1].endswith("the mean of 2 steps")


def test_what_smoothing_leaves_out_is_said():
    said = []
    quantize(
        tiny_model("qwen2_moe"),
        Recipe(name="s", weights=W2, smoothing={"method": "awq", "exponents": 2}, calibration=CALIBRATION),
        progress=lambda what, *_: said.append(what),
    )
    assert any(what.startswith("not smoothed: ") for what in said)


@pytest.mark.parametrize(
    ("calibration", "says"),
    [({"samples": 10**6}, "fewer samples"), ({"tokens": 10**6, "samples": 1}, "tokens: 512")],
)
def test_more_text_than_there_is_names_the_recipes_fields(base, calibration, says):
    with pytest.raises(BitassayError, match=says):
        quantize(base, recipe("gptq", calibration=calibration))

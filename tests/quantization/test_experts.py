"""Experts are quantized slice by slice, run one by one, and shown to the calibration as they are reached."""

import copy
import fnmatch

import pytest
import torch
from torch import nn

import bitassay
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.walk import fused_experts, matrices, walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export.save import save
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.experts import (
    QuantizedExperts,
    changed_fraction,
    expert_inputs,
    routes,
    warn_of_few,
)
from bitassay.quantization.runtime.kernels import MAX_ROWS
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.model import (
    bits_per_weight,
    parameter_count,
    size_bytes,
    with_tensors,
)
from bitassay.quantization.solvers import layers
from bitassay.testing.tiny import tiny_model

MIXTURES = ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"]
IDS = torch.arange(3, 43).view(2, 20)
W4 = Recipe(name="test", weights={"format": "int4", "granularity": "g32", "symmetric": False})


def mixture(architecture: str, seed: int = 0):
    """With biases that are not zero, and eager experts, whose order of operations is ours."""
    model = tiny_model(architecture, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.set_experts_implementation("eager")
    return model


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def same(architecture: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """Bitwise, except where the eager implementation multiplies in another layout and adds the bias apart."""
    if architecture == "gpt_oss":
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(one, other)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_each_slice_has_scales_of_its_own(architecture):
    base = mixture(architecture)
    fake = bitassay.quantize(base, W4)
    tensors, views, held = fake.quantization.tensors, matrices(base), matrices(fake)
    assert list(tensors) == list(views)
    for name, view in views.items():
        expected = quantize_tensor(view, W4.weights).dequantize()
        assert torch.equal(held[name], expected), name
    for name in (*walk(base).routers, "model.embed_tokens.weight", "lm_head.weight"):
        assert fake.get_parameter(name) is base.get_parameter(name)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_fake_and_real_models_give_the_same_logits(architecture):
    base = mixture(architecture)
    before = logits(base)
    fake, real = bitassay.quantize(base, W4), bitassay.quantize(base, W4, packed=True)
    same(architecture, logits(fake), logits(real))
    assert torch.equal(logits(base), before)
    assert not torch.allclose(logits(fake), before, atol=1e-4)
    parts = [type(module) for module in real.modules()]
    assert parts.count(QuantizedExperts) == len(fused_experts(base))
    assert parts.count(QuantizedLinear) == len(walk(base).linears)
    fake.set_experts_implementation("grouped_mm")  # what transformers takes by default
    torch.testing.assert_close(logits(fake), logits(real), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "gpt_oss"])
def test_a_recipe_may_leave_some_experts_out(architecture):
    base = mixture(architecture)
    recipe = Recipe(
        name="some",
        weights=W4.weights,
        overrides=[
            {"match": "*.experts.*.2", "weights": None},
            {"match": "*.layers.1.*.down_proj.*", "weights": {"format": "int8"}},
            {"match": "*.layers.2.*.experts.gate_up_proj.*", "weights": None},
        ],
    )
    fake, real = bitassay.quantize(base, recipe), bitassay.quantize(base, recipe, packed=True)
    same(architecture, logits(fake), logits(real))
    tensors = fake.quantization.tensors
    assert not fnmatch.filter(tensors, "*.experts.*.2")
    assert tensors["model.layers.1.mlp.experts.down_proj.3"].scheme.format == "int8"
    assert tensors["model.layers.2.mlp.experts.down_proj.3"].scheme.format == "int4"
    assert "model.layers.2.mlp.experts.gate_up_proj.3" not in tensors
    assert torch.equal(
        matrices(fake)["model.layers.1.mlp.experts.down_proj.2"],
        matrices(base)["model.layers.1.mlp.experts.down_proj.2"],
    )
    count = sum(p.numel() for p in base.parameters())
    assert parameter_count(fake) == parameter_count(real) == parameter_count(base) == count
    stored = sum(tensor.stored_bits for tensor in tensors.values())
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values())
    assert bits_per_weight(real) == stored / weights
    assert size_bytes(fake) == size_bytes(real) == 2 * (count - weights) + stored // 8


def test_a_real_mixture_follows_to_bf16():
    base = mixture("qwen3_moe")
    real = bitassay.quantize(base, W4, packed=True).to(torch.bfloat16)
    fake = bitassay.quantize(base, W4).to(torch.bfloat16)
    for layer in range(3):
        there, here = (m.model.layers[layer].mlp.experts for m in (fake, real))
        assert torch.equal(here.matrix("down_proj", 1), there.down_proj[1])
    long = torch.arange(3, 3 + MAX_ROWS + 1)[None]  # more rows than the linears' kernels take
    with torch.inference_mode():
        assert torch.equal(real(long).logits, fake(long).logits)


@pytest.mark.sample(4)
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_taps_see_what_each_slice_multiplies(architecture, every):
    model = mixture(architecture)
    before, views, seen = logits(model), matrices(model), {}
    with expert_inputs(model, lambda name, x: seen.setdefault(name, []).append(x), every=every) as load:
        same(architecture, logits(model), before)
    assert torch.equal(logits(model), before)
    assert not any("forward" in vars(module) for module in model.modules())
    for name, experts in fused_experts(model).items():
        inputs = {}
        hook = experts.register_forward_pre_hook(lambda _, given: inputs.update(given=given))  # noqa: B023
        logits(model)
        hook.remove()
        x, chosen, _ = inputs["given"]
        assert load[name].tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
        assert load[name].sum() == chosen.numel() == 2 * IDS.numel()
        for expert in range(4):
            rows = x if every else x[torch.where((chosen == expert).T)[1]]  # first choices first
            first, second = (f"{name}.{parameter}.{expert}" for parameter in ("gate_up_proj", "down_proj"))
            if not len(rows):
                assert first not in seen
                continue
            torch.testing.assert_close(torch.cat(seen[first]), rows)
            bias = experts.gate_up_proj_bias[expert] if experts.has_bias else 0
            inner = experts._apply_gate(rows @ views[first].T + bias)
            torch.testing.assert_close(torch.cat(seen[second]), inner, rtol=1e-4, atol=1e-6)
    assert set(seen) <= set(views)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("architecture", ["deepseek_v2", "gpt_oss"])
def test_a_tap_that_writes_quantizes_a_layer_in_passing(architecture, every):
    base = mixture(architecture)
    draft, prefix = copy.deepcopy(base), "model.layers.2."
    layer, before = draft.model.layers[2], logits(base)
    x, written = torch.randn(1, 20, 96, generator=torch.Generator().manual_seed(0)), []
    slices = {
        name.removeprefix(prefix): view
        for name, view in matrices(draft).items()
        if name.startswith(f"{prefix}mlp.experts.")
    }

    def double(name: str, inputs: torch.Tensor) -> None:
        assert len(inputs)
        slices[name] *= 2
        written.append(name)

    def output(layer) -> torch.Tensor:
        found = layer.mlp(x)
        return found[0] if isinstance(found, tuple) else found

    with expert_inputs(layer, double, every=every):
        passed = output(layer)
    assert written[0].startswith("mlp.experts.gate_up_proj.")
    assert sorted(written) == sorted(set(written))
    assert torch.equal(output(layer), passed)
    assert not torch.equal(output(base.model.layers[2]), passed)
    assert torch.equal(logits(base), before)
    assert set(written) == set(slices) if every else set(written) <= set(slices)


def starved(architecture: str = "mixtral"):
    """No token reaches expert 3 of layer 1."""
    model = mixture(architecture)
    gate = model.model.layers[1].mlp.gate

    def away(module, given, output):
        scores = output[0].clone()
        scores[:, 3] = -torch.inf
        value, index = scores.softmax(1).topk(2, dim=1)
        return scores, value / value.sum(1, keepdim=True), index

    gate.register_forward_hook(away)
    return model


def test_an_expert_that_no_token_reached_is_named_and_has_no_inputs():
    model, seen, said = starved(), set(), []
    with expert_inputs(model, lambda name, x: seen.add(name)) as load:
        logits(model)
    warn_of_few(load, 10, lambda what, *_: said.append(what))
    none = {
        f"{name}.{expert}"
        for name, counts in load.items()
        for expert in (counts == 0).nonzero()[:, 0].tolist()
    }
    assert "model.layers.1.mlp.experts.3" in none  # and some that the random routers never take
    unseen = {
        name.rpartition(".")[0].rpartition(".")[0] + "." + name.rpartition(".")[2]
        for name in set(matrices(model)) - seen - set(walk(model).linears)
    }
    assert unseen == none
    assert any("3 (0)" in line and "rounded to nearest" in line for line in said)
    assert all(f"({int(count)})" in "".join(said) for layer in load.values() for count in layer if count < 10)


def test_nothing_is_said_where_all_experts_got_enough():
    said = []
    warn_of_few({"a": torch.tensor([7, 5])}, 5, lambda what, *_: said.append(what))
    assert not said
    warn_of_few({"a": torch.tensor([7, 4])}, 5, lambda what, *_: said.append(what))
    assert "expert 1 (4)" in said[0]
    assert "nearest" not in said[0]


def test_routing_agreement_counts_tokens_whose_set_changed():
    base = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3]])
    other = torch.tensor([[1, 0], [2, 1], [2, 1], [3, 1]])
    assert changed_fraction(base, other) == 0.5
    assert changed_fraction(base, base) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_routes_of_a_quantized_model(packed):
    base = mixture("qwen3_moe")
    names = list(fused_experts(base))
    coarse = Recipe(name="w2", weights={"format": "int2", "granularity": "tensor"})
    quantized = with_tensors(base, bitassay.quantize(base, coarse).quantization, packed=packed)
    here, there = routes(base, IDS, names), routes(quantized, IDS, names)
    assert list(here) == names
    assert here[names[0]].shape == (IDS.numel(), 2)
    # Experts come after the first router, but attention before it is quantized too.
    assert 0 < changed_fraction(here[names[2]], there[names[2]]) < 1
    assert all(
        changed_fraction(a, b) == 0
        for a, b in zip(here.values(), routes(base, IDS, names).values(), strict=True)
    )
    assert not quantized.get_submodule(names[0])._forward_pre_hooks


@pytest.mark.parametrize("pattern", ["*.mlp.gate", "model.layers.0.mlp.gate.weight", "*.shared_expert_gate"])
@pytest.mark.parametrize("weights", [None, {"format": "int8"}])
def test_a_router_in_a_recipe_is_refused(pattern, weights):
    recipe = Recipe(name="bad", weights=W4.weights, overrides=[{"match": pattern, "weights": weights}])
    with pytest.raises(BitassayError, match=r"names a router.*which expert answers"):
        bitassay.quantize(mixture("qwen2_moe"), recipe)


def test_a_pattern_for_the_fused_parameter_is_shown_how_to_name_slices():
    recipe = Recipe(
        name="typo", weights=W4.weights, overrides=[{"match": "*.experts.down_proj", "weights": None}]
    )
    with pytest.raises(BitassayError, match=r"'\*\.experts\.down_proj\.\*'"):
        bitassay.quantize(mixture("mixtral"), recipe)


def test_matrices_that_nothing_knows_are_refused_not_skipped():
    model = mixture("mixtral")
    model.model.layers[1].mlp.strange = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(
        BitassayError, match=r"cannot quantize, such as model\.layers\.1\.mlp\.strange"
    ) as caught:
        bitassay.quantize(model, W4)
    assert "match: '*.strange', weights: null" in caught.value.remedy


def test_nan_weights_are_refused_by_the_name_of_the_slice():
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(BitassayError, match=r"model\.layers\.1\.mlp\.experts\.down_proj\.2"):
        bitassay.quantize(model, W4)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_saved_mixture_loads_as_it_was(architecture, packed, tmp_path):
    base = mixture(architecture)
    some = [{"match": "*.experts.down_proj.2", "weights": None}]
    model = bitassay.quantize(base, Recipe(name="some", weights=W4.weights, overrides=some), packed=packed)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", attention=base.config._attn_implementation)
    again.set_experts_implementation("eager")
    same(architecture, logits(again), logits(model))
    assert bits_per_weight(again) == bits_per_weight(model)
    assert size_bytes(again) == size_bytes(model)


def test_the_pipeline_calibrates_on_all_tokens_that_reach_an_expert(monkeypatch):
    base, rows = mixture("mixtral"), []
    original = layers.hessian_of
    monkeypatch.setattr(layers, "hessian_of", lambda x: (rows.append(len(x)), original(x))[1])
    calibration = {"samples": 3, "tokens": 40}
    said = []
    bitassay.quantize(
        base,
        Recipe.model_validate(
            {"name": "gptq", "weights": W4.weights, "gptq": {}, "calibration": calibration}
        ),
        progress=lambda what, *_: said.append(what),
    )
    # Each token goes to two experts, and each of them has two matrices.
    assert sum(rows) == 3 * (3 * 40 * 2 * 2)
    assert any("calibrated on fewer than" in line for line in said)

"""What a changed matrix does: measured by running the model, and predicted without."""

import copy

import numpy as np
import pytest
import torch

import bitassay
from bitassay.models.walk import fused_experts, matrices, walk
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.quantization.solvers.sensitivity import (
    NOTHING_ELSE,
    OutputError,
    divergences,
    matrix_locations,
    mean_divergence,
    observe,
    predicted_divergences,
)
from bitassay.testing.tiny import tiny_model

IDS = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))


def tensors(model, format="int4"):
    weights = {"format": format, "granularity": "g32", "symmetric": False}
    return bitassay.quantize(model, Recipe(name="test", weights=weights)).quantization.tensors


def test_divergence_is_the_textbooks():
    base, other = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).unbind(0)
    p, q = base.double().softmax(1), other.double().softmax(1)
    assert mean_divergence(base, other) == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert mean_divergence(base, base) == 0


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_moe", "gpt_oss"])
def test_places_are_layers_and_names_there(architecture):
    model = tiny_model(architecture)
    found = matrix_locations(model)
    assert list(found) == list(matrices(model))
    assert {place.layer for place in found.values()} == {0, 1, 2}
    assert found["model.layers.2.self_attn.q_proj"] == (2, "self_attn.q_proj")
    if architecture != "gemma3":
        assert found["model.layers.1.mlp.experts.down_proj.3"] == (1, "mlp.experts.down_proj")


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_moe"])
def test_divergences_are_those_of_whole_runs(architecture):
    model = tiny_model(architecture)
    codes = tensors(model, "int2")
    before = {name: view.clone() for name, view in matrices(model).items()}
    groups = {
        str(layer): {
            name: codes[name] for name, place in matrix_locations(model).items() if place.layer == layer
        }
        for layer in range(3)
    }
    groups |= {"late": {name: codes[name] for name in codes if name.endswith("o_proj") and ".0." not in name}}
    found = dict(divergences(model, groups, IDS[0]))
    assert list(found) == list(groups)
    with torch.inference_mode():
        wanted = model(IDS[:1]).logits[0]
        for label, group in groups.items():
            whole = with_tensors(model, Quantization(NOTHING_ELSE, group))(IDS[:1]).logits[0]
            assert found[label] == pytest.approx(mean_divergence(wanted, whole), rel=1e-4)
            assert found[label] > 0
        assert torch.equal(model(IDS[:1]).logits[0], wanted)
    assert all(torch.equal(view, before[name]) for name, view in matrices(model).items())


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v2", "gpt_oss"])
def test_output_errors_are_those_of_the_matrices_inputs(architecture):
    model = tiny_model(architecture)
    fine, coarse = tensors(model, "int8"), tensors(model, "int2")
    errors, seen = OutputError(model, {name: [fine[name], coarse[name]] for name in fine}), {}

    def tap(name, x):
        errors(name, x)
        seen.setdefault(name, []).append(x)

    done = []
    load = observe(model, IDS, tap, done.append)
    assert done == [1, 2, 3, 4]
    assert set(load) == set(fused_experts(model))
    for name, view in matrices(model).items():
        if name not in seen:  # an expert that no token reached
            assert errors.relative(name) is None
            continue
        x = torch.cat(seen[name]).double()
        assert errors.rows[name] == len(x)
        if name in walk(model).linears:
            assert len(x) == IDS.numel()
        for found, tensor in zip(errors.relative(name), (fine[name], coarse[name]), strict=True):
            change = x @ (tensor.dequantize().double() - view.double()).T
            assert found == pytest.approx(
                (change.square().sum() / (x @ view.double().T).square().sum()).item(), rel=1e-4
            )
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def hooks_of(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_predictions_are_near_what_is_measured(stories):
    codes = tensors(stories)
    names, text, before = list(codes), IDS.repeat(2, 1), hooks_of(stories)
    predicted = predicted_divergences(stories, {name: [codes[name]] for name in names}, text)
    measured = np.zeros(len(names))
    for window in text:
        measured += [
            kl for _, kl in divergences(stories, {name: {name: codes[name]} for name in names}, window)
        ]
    ratio = np.log([predicted[name][0] for name in names]) - np.log(measured / len(text))
    assert abs(ratio.mean()) < 0.5  # a factor of 1.6 on average
    assert ratio.std() < 0.5 * np.log(measured).std()
    assert hooks_of(stories) == before  # transformers may have some of its own there
    assert all(parameter.grad is None for parameter in stories.parameters())


def test_predictions_grow_with_the_square_of_the_change_and_cover_experts():
    model = tiny_model("qwen3_moe")
    codes = tensors(model)
    found = predicted_divergences(
        model, {name: [codes[name], _doubled(model, codes, name)] for name in codes}, IDS[:2]
    )
    reached = {name for name, (once, _) in found.items() if once > 0}
    assert {name for name in codes if ".experts." not in name} <= reached
    assert any(".experts.down_proj." in name for name in reached)
    for name in reached:
        once, twice = found[name]
        assert twice == pytest.approx(4 * once, rel=1e-2)


def _doubled(model, codes, name):
    """Something that dequantizes to twice the error."""
    twice = copy.copy(codes[name])
    value = 2 * codes[name].dequantize() - matrices(model)[name]
    object.__setattr__(twice, "dequantize", lambda: value)
    return twice

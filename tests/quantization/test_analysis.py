"""The analysis finds the matrix that was made hard to quantize, and goes on where it stopped."""

import copy
import json

import pytest
import torch

import bitassay
from bitassay.errors import BitassayError
from bitassay.models.walk import fused_experts, matrices
from bitassay.quantization import analysis
from bitassay.quantization.analysis import AnalysisPlan, analyze
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.experts import changed_fraction, routes
from bitassay.quantization.runtime.model import bits_per_weight
from bitassay.quantization.solvers.sensitivity import mean_divergence
from bitassay.testing.tiny import tiny_model

TEXT = Calibration(samples=2, tokens=32)
W3 = Recipe(name="w3", weights={"format": "int3", "granularity": "g32", "scale": "absmax"})


@pytest.fixture(scope="module")
def run(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "run"
    return analyze(stories, W3, AnalysisPlan(TEXT, each_matrix=True), out=folder)


def test_every_matrix_and_layer_has_a_row(stories, run):
    found, folder = run
    assert [row["name"] for row in found["matrices"]] == list(matrices(stories))
    assert [row["layer"] for row in found["layers"]] == list(range(5))
    assert found["routing"] == []
    assert json.loads((folder / "run.json").read_text()) == found
    down = next(row for row in found["matrices"] if row["name"].endswith("2.mlp.down_proj"))
    assert (down["layer"], down["kind"], down["shape"]) == (2, "mlp.down_proj", [64, 172])
    assert down["tokens"] == 64


def test_numbers_are_those_of_the_quantized_model(stories, run):
    found, _ = run
    quantized = bitassay.quantize(stories, W3)
    tokens = calibration_tokens(stories, TEXT)
    assert found["whole"]["bits_per_weight"] == bits_per_weight(quantized)
    with torch.inference_mode():
        kl = [mean_divergence(stories(w[None]).logits[0], quantized(w[None]).logits[0]) for w in tokens]
    assert found["whole"]["kl"] == pytest.approx(sum(kl) / 2, rel=1e-4)
    assert found["whole"]["kl_se"] == pytest.approx(abs(kl[0] - kl[1]) / 2, rel=1e-3)
    views, changed = matrices(stories), matrices(quantized)
    for row in found["matrices"]:
        error = (changed[row["name"]] - views[row["name"]]).norm() / views[row["name"]].norm()
        assert row["weight_error"] == pytest.approx(error.item(), rel=1e-5)
        assert 0 < row["output_error"] < 1
        assert row["weight_variance"] == pytest.approx(views[row["name"]].var(correction=0).item(), rel=1e-4)
    for layer in found["layers"]:
        parts = [row["kl"] for row in found["matrices"] if row["layer"] == layer["layer"]]
        assert max(parts) < layer["kl"] < 3 * sum(parts)


def test_hidden_statistics_are_those_of_the_layers_outputs(stories, run):
    with torch.inference_mode():
        tokens = calibration_tokens(stories, TEXT)
        states = [stories(w[None], output_hidden_states=True).hidden_states for w in tokens]
    for index, row in enumerate(run[0]["layers"][:-1]):  # the last one's are normed there
        x = torch.cat([state[index + 1][0] for state in states])
        assert row["hidden_mean"] == pytest.approx(x.mean().item(), rel=1e-3, abs=1e-6)
        assert row["hidden_variance"] == pytest.approx(x.var(correction=0).item(), rel=1e-3)


def test_a_spoilt_matrix_stands_out(stories, tmp_path):
    model = copy.deepcopy(stories)
    model.identity = stories.identity
    victim = model.model.layers[3]
    victim.post_attention_layernorm.weight[5] /= 30  # the same function, with a column that is too wide
    for linear in (victim.mlp.gate_proj, victim.mlp.up_proj):
        linear.weight[:, 5] *= 30
    found, _ = analyze(model, W3, AnalysisPlan(TEXT), out=tmp_path / "run")
    by_name = {row["name"]: row for row in found["matrices"]}
    spoilt = [by_name.pop(f"model.layers.3.mlp.{which}_proj") for which in ("gate", "up")]
    assert all(row["weight_outlier_columns"] == 1 for row in spoilt)
    for measure in ("weight_kurtosis", "output_error", "kl_predicted"):
        assert min(row[measure] for row in spoilt) > max(row[measure] for row in by_name.values())
    worst = max(found["layers"], key=lambda row: row["kl"])
    assert worst["layer"] == 3
    assert spoilt[0]["kl"] is None  # not asked for


def test_what_is_finished_is_not_done_again(stories, tmp_path, monkeypatch):
    plan, original, calls = AnalysisPlan(TEXT), analysis.divergences, []

    def second_fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(analysis, "divergences", second_fails)
    with pytest.raises(KeyboardInterrupt):
        analyze(stories, W3, plan, out=tmp_path / "run")
    monkeypatch.setattr(analysis, "_statistics", None)
    first, _ = analyze(stories, W3, plan, out=tmp_path / "run")
    assert len(calls) == 3
    monkeypatch.setattr(analysis, "divergences", None)
    monkeypatch.setattr(analysis, "rounded_to_nearest", None)
    again, _ = analyze(stories, W3, plan, out=tmp_path / "run")
    assert again["layers"] == first["layers"]
    with pytest.raises(BitassayError, match="another plan"):
        analyze(stories, W3, AnalysisPlan(TEXT, each_matrix=True), out=tmp_path / "run")


def test_a_mixture_has_slices_and_routing(tmp_path):
    model = tiny_model("qwen3_moe")
    coarse = Recipe(name="w2", weights={"format": "int2", "granularity": "tensor"})
    found, _ = analyze(model, coarse, AnalysisPlan(TEXT, each_matrix=True), out=tmp_path / "run")
    rows = {row["name"]: row for row in found["matrices"]}
    assert set(rows) == set(matrices(model))
    slices = [rows[f"model.layers.1.mlp.experts.down_proj.{expert}"] for expert in range(4)]
    assert {row["kind"] for row in slices} == {"mlp.experts.down_proj"}
    assert len({row["kl"] for row in slices}) == 1
    tokens, names = calibration_tokens(model, TEXT), list(fused_experts(model))
    assert [row["module"] for row in found["routing"]] == names
    quantized = bitassay.quantize(model, coarse)
    for row in found["routing"]:
        assert sum(row["load"]) == row["tokens"] * 2 == 2 * tokens.numel()
        expected = changed_fraction(*(routes(m, tokens, names)[row["module"]] for m in (model, quantized)))
        assert row["changed_fraction"] == pytest.approx(expected)
        loads = [rows[f"{row['module']}.down_proj.{expert}"]["tokens"] for expert in range(4)]
        assert loads == row["load"]
        assert row["fewest_tokens"] == min(loads)
    assert max(row["changed_fraction"] for row in found["routing"]) > 0


def test_a_layer_that_the_recipe_leaves_alone_costs_nothing(stories, tmp_path):
    alone = [{"match": "model.layers.0.*", "weights": None}]
    found, _ = analyze(
        stories,
        W3.model_copy(update={"overrides": Recipe(name="x", weights=None, overrides=alone).overrides}),
        AnalysisPlan(TEXT),
        out=tmp_path / "run",
    )
    assert found["layers"][0]["kl"] == 0
    assert not any(row["layer"] == 0 for row in found["matrices"])
    with pytest.raises(BitassayError, match="quantizes nothing"):
        analyze(stories, Recipe(name="none", weights=None), AnalysisPlan(TEXT), out=tmp_path / "other")

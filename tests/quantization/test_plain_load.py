"""What plain transformers loads of a compressed-tensors folder: mixtures, classes that it cannot prepare, names."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bitassay
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.quantization.export.plain_load import expert_pieces, part_of
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.runtime.model import with_tensors
from bitassay.testing.architectures import tiny_architecture
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 35)[None]
PLAINLY = ["int8 channel", "int4 g32", "int3 g32", "ternary g32", "fp8_e4m3 channel"]


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def recipe(scheme: str, **more):
    form, granularity = scheme.split()
    weights = {"format": form, "granularity": granularity}
    return Recipe.model_validate({"name": "test", "weights": weights | more.pop("weights", {})} | more)


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [("mixtral", "int4 g32"), ("deepseek_v2", "int8 channel"), *(("qwen2_moe", one) for one in PLAINLY)],
)
def test_mixtures_come_back_exactly(tmp_path, architecture, scheme):
    base = tiny_model(architecture, num_hidden_layers=2)
    fake = bitassay.quantize(base, recipe(scheme))
    plan = plan_export(base, recipe(scheme))
    assert (plan.layout, plan.layout_reason) == ("compressed-tensors", None)
    real = with_tensors(base, fake.quantization, packed=True)
    for name, model in (("fake", fake), ("real", real)):
        assert save(model, tmp_path / name).layout == "compressed-tensors"
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(plain), logits(fake))
        again = load(tmp_path / name)
        assert torch.equal(logits(again), logits(fake))
        assert again.quantization.tensors.keys() == fake.quantization.tensors.keys()
    assert plan.tensor_bytes == sum(
        tensor.numel() * tensor.element_size()
        for path in [tmp_path / "fake" / "model.safetensors"]
        for tensor in _tensors(path)
    )


def _tensors(path):
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a dict)


def test_the_names_are_those_of_published_checkpoints(tmp_path):
    save(bitassay.quantize(tiny_model("mixtral", num_hidden_layers=1), recipe("int4 g32")), tmp_path / "out")
    names = names_in(tmp_path / "out")
    assert {f"model.layers.0.block_sparse_moe.experts.3.w{n}.weight_packed" for n in (1, 2, 3)} <= names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"re:.*\.experts\.\d+\..*" in [t for g in config["config_groups"].values() for t in g["targets"]]


WHY = {
    "zero points": ("qwen2_moe", recipe("int4 g32", weights={"symmetric": False})),
    "in part": ("qwen2_moe", recipe("int4 g32", overrides=[{"match": "*.experts.*.2", "weights": None}])),
    "by one scheme": (
        "qwen2_moe",
        recipe("int4 g32", overrides=[{"match": "*.down_proj.*", "weights": {"format": "int8"}}]),
    ),
    "one scale each": ("qwen2_moe", recipe("int8 tensor")),
    "groups that divide": ("qwen2_moe", recipe("int4 g40")),
    "reads such experts from one tensor": ("gpt_oss", recipe("int8 channel")),
}


@pytest.mark.parametrize("why", WHY)
def test_else_the_reason_is_said_before_the_work(tmp_path, why):
    architecture, wanted = WHY[why]
    base = tiny_model(architecture, num_hidden_layers=2)
    plan = plan_export(base, wanted)
    assert plan.layout == "bitassay"
    assert why in plan.layout_reason
    with pytest.raises(BitassayError, match=why):
        plan_export(base, wanted, "compressed-tensors")
    assert plan_export(base, wanted, "bitassay").layout_reason is None  # it was asked for
    said = []
    card = save(
        bitassay.quantize(base, wanted), tmp_path / "out", progress=lambda what, *_: said.append(what)
    )
    assert card.layout == "bitassay"
    assert any(why in line for line in said)


def test_w4_of_a_mixture_is_ours_and_w8_is_not():
    base = tiny_model("qwen3_moe", num_hidden_layers=1)
    assert plan_export(base, find_recipe("w4")).layout == "bitassay"
    assert plan_export(base, find_recipe("w8")).layout == "compressed-tensors"


def test_dense_experts_stay_in_one_tensor(tmp_path):
    base = tiny_model("mixtral", num_hidden_layers=1)
    attention = recipe("int4 g32", overrides=[{"match": "*.experts.*", "weights": None}])
    quantized = bitassay.quantize(base, attention)
    assert save(quantized, tmp_path / "out").layout == "compressed-tensors"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(quantized))


@pytest.mark.parametrize("architecture", ["falcon", "nanochat", "zamba2"])
def test_classes_that_look_for_weights_get_our_layout(tmp_path, architecture):
    quantized = bitassay.quantize(tiny_architecture(architecture), recipe("int4 g32"))
    assert (
        "looks for weights" in plan_export(tiny_architecture(architecture), recipe("int4 g32")).layout_reason
    )
    assert save(quantized, tmp_path / "out").layout == "bitassay"
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantized))


@pytest.mark.parametrize("architecture", ["gemma3", "lfm3", "olmo_hybrid", "granitemoehybrid"])
def test_renamed_modules_come_back(tmp_path, architecture):
    base = tiny_architecture(architecture)
    quantized = bitassay.quantize(base, recipe("int4 g32"))
    card = save(quantized, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantized))
    if card.layout == "compressed-tensors":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(plain), logits(quantized), rtol=0, atol=1e-5)


def test_pieces_are_the_rows_of_a_slice():
    base = tiny_model("qwen3_moe", num_hidden_layers=1)
    quantized = bitassay.quantize(base, recipe("int4 g32"))
    name = "model.layers.0.mlp.experts.gate_up_proj.2"
    tensor, pieces = quantized.quantization.tensors[name], expert_pieces(base)[name]
    assert [piece.name.rpartition("experts.")[2] for piece in pieces] == ["2.gate_proj", "2.up_proj"]
    parts = [part_of(tensor, piece).dequantize() for piece in pieces]
    assert torch.equal(torch.cat(parts), tensor.dequantize())

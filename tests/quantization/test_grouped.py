"""Folders with packed zero points, as other tools write them and vLLM reads them: the library is the oracle."""

import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor, decompress_module
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from safetensors.torch import load_file, save_file
from torch import nn

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.quantization.export.card import CARD_FILE
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 60)[None]
CASES = [("int4", "g32"), ("int3", "g32"), ("int2", "g32"), ("int8", "channel")]


def recipe(**weights) -> Recipe:
    return Recipe.model_validate(
        {"name": "test", "weights": {"scale": "absmax", "symmetric": False} | weights}
    )


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)


def decoded(folder) -> dict[str, torch.Tensor]:
    """What the library makes of every matrix in the folder, by the description in config.json."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in said.items() if k != "quant_method"})
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    tensors, matrices = load_file(folder / "model.safetensors"), {}
    for name in (key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")):
        parts = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        matrices[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return matrices


@pytest.mark.parametrize(("format", "granularity"), CASES)
def test_the_library_decodes_the_same_weights(tiny, tmp_path, format, granularity):
    quantized = quantize(tiny, recipe(format=format, granularity=granularity))
    plan = plan_export(tiny, recipe(format=format, granularity=granularity))
    card = save(quantized, tmp_path / "out")
    assert plan.layout == card.layout == "vllm"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.tensor_bytes == sum(value.nbytes for value in stored.values())
    # Zero points take the recipe's bits, but for the padding of 32-bit words and the shape of each matrix.
    assert card.bits_per_weight <= card.stored_bits_per_weight < card.bits_per_weight + 0.03
    matrices = decoded(tmp_path / "out")
    assert matrices.keys() == quantized.quantization.tensors.keys()
    for name, tensor in quantized.quantization.tensors.items():
        assert torch.equal(matrices[name], tensor.dequantize()), name
    again = load(tmp_path / "out")
    (tmp_path / "out" / CARD_FILE).unlink()  # as any other tool's
    for model in (again, load(tmp_path / "out")):
        assert torch.equal(model(IDS).logits, quantized(IDS).logits)


def test_groups_that_do_not_divide_rows_are_for_transformers(tiny, tmp_path):
    uneven = recipe(format="int4", granularity="g64")
    assert plan_export(tiny, uneven).layout == "compressed-tensors"
    with pytest.raises(BitassayError, match="groups of 64 do not divide its 96 columns"):
        plan_export(tiny, uneven, "vllm")
    with pytest.raises(BitassayError, match="not with one scale for all"):
        plan_export(tiny, recipe(format="int4", granularity="tensor"), "vllm")
    assert (
        plan_export(tiny, recipe(format="int4", granularity="g32", symmetric=True), "vllm").layout == "vllm"
    )


def written_by_the_library(base, folder, *, symmetric: bool, actorder: bool) -> dict[str, torch.Tensor]:
    """A folder as llm-compressor writes it, and the weights that it stands for."""
    args = {"num_bits": 4, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format="pack-quantized")
    base.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    state, weights = load_file(folder / "model.safetensors"), {}
    for place, name in enumerate(n for n, m in base.named_modules() if isinstance(m, nn.Linear)):
        if name == "lm_head":
            continue
        generator = torch.Generator().manual_seed(place)
        weight = state.pop(f"{name}.weight")
        order = (
            torch.randperm(weight.shape[1], generator=generator)
            if actorder
            else torch.arange(weight.shape[1])
        )
        groups = weight[:, order].reshape(len(weight), -1, 32)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / 15 if not symmetric else groups.abs().amax(2) / 7.5).half().float()
        zero = (-8 - low / scale).round().to(torch.int8)
        parts = {"weight": weight[:, order].contiguous(), "weight_scale": scale}
        if not symmetric:
            parts["weight_zero_point"] = zero
        in_order = PackedQuantizationCompressor.compress(parts, scheme)
        module = nn.Linear(weight.shape[1], len(weight), bias=False)
        del module.weight
        for key, value in in_order.items():
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        module.quantization_scheme = scheme
        decompress_module(module)
        back = order.argsort()
        weights[name] = module.weight.data[:, back]
        if actorder:  # columns lie where they were, and each names its group
            parts["weight"], parts["weight_scale"] = weights[name], scale
            codes = unpack_from_int32(in_order["weight_packed"], 4, torch.Size(weight.shape))
            in_order["weight_packed"] = pack_to_int32(codes[:, back].contiguous(), 4)
            in_order["weight_g_idx"] = (back // 32).to(torch.int32)
        in_order["weight_scale"] = in_order["weight_scale"].half()
        state |= {f"{name}.{key}": value for key, value in in_order.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))
    if actorder:  # llm-compressor said so before the library dropped it
        said = json.loads((folder / "config.json").read_text())
        said["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
        (folder / "config.json").write_text(json.dumps(said))
    return weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", [False, True])
def test_folders_of_other_tools(tiny, tmp_path, symmetric, actorder):
    weights = written_by_the_library(tiny, tmp_path / "out", symmetric=symmetric, actorder=actorder)
    model = load(tmp_path / "out")
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
        assert (weight - tiny.get_submodule(name).weight).abs().max() < 0.1


def test_tensors_that_do_not_fit_are_refused(tiny, tmp_path):
    written_by_the_library(tiny, tmp_path / "out", symmetric=False, actorder=True)
    path = tmp_path / "out" / "model.safetensors"
    state, name = load_file(path), "model.layers.0.self_attn.q_proj"

    def refused(changed: dict, why: str) -> None:
        save_file(state | changed, path, metadata={"format": "pt"})
        with pytest.raises(BitassayError, match=why):
            load(tmp_path / "out")

    order, zero = state[f"{name}.weight_g_idx"], state[f"{name}.weight_zero_point"]
    refused({f"{name}.weight_g_idx": order.clamp(max=0)}, "does not put 96 columns into 3 groups of 32")
    refused({f"{name}.weight_g_idx": order[:-1].clone()}, r"weight_g_idx is torch.int32 \[95\]")
    refused({f"{name}.weight_zero_point": zero[:-1].clone()}, r"weight_zero_point is torch.int32 \[11, 3\]")

"""The walk finds every matrix of the decoder layers, exactly once, in every architecture."""

import pytest
import torch
from torch import nn

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, matrices, walk
from bitassay.testing.tiny import ARCHITECTURES, tiny_model

LAYERS = 3
# Per layer: attention q, k, v, o, and a dense MLP's gate, up, down; a mixture has fused gate_up and down
# instead, and Qwen2-MoE a dense shared expert beside them with a gate of its own.
# DeepSeek-V2's attention has five, and its first layer is dense.
LINEARS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3"), (7, 7, 7)) | {
    "qwen2_moe": (7, 7, 7),
    "qwen3_moe": (4, 4, 4),
    "mixtral": (4, 4, 4),
    "deepseek_v2": (8, 8, 8),
    "gpt_oss": (4, 4, 4),
}
EXPERTS = dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss"), (2, 2, 2)) | {
    "deepseek_v2": (0, 2, 2)
}
ROUTERS = {
    "qwen2_moe": (2, 2, 2),
    "qwen3_moe": (1, 1, 1),
    "mixtral": (1, 1, 1),
    "deepseek_v2": (0, 1, 1),
    "gpt_oss": (1, 1, 1),
}
NONE = (0, 0, 0)


def by_layer(names) -> tuple[int, ...]:
    return tuple(sum(f".layers.{layer}." in name for name in names) for layer in range(LAYERS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_is_in_one_bin(architecture):
    model = tiny_model(architecture)
    found = walk(model)
    assert by_layer(found.linears) == LINEARS[architecture]
    assert by_layer(found.experts) == EXPERTS.get(architecture, NONE)
    assert by_layer(found.routers) == ROUTERS.get(architecture, NONE)
    assert not found.others
    named = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim >= 2}
    named -= {name for name in named if name.endswith("_bias")}  # a vector for each expert
    bins = [[f"{name}.weight" for name in found.linears], found.experts, found.routers]
    assert sorted(name for each in bins for name in each) == sorted(named)


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_names_lead_to_the_modules(architecture):
    model = tiny_model(architecture)
    found = walk(model)
    assert all(model.get_submodule(name) is linear for name, linear in found.linears.items())
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in (found.experts | found.routers).items())


def test_the_gate_of_a_shared_expert_is_a_router():
    found = walk(tiny_model("qwen2_moe"))
    assert found.routers["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 96)
    assert "model.layers.0.mlp.shared_expert.gate_proj" in found.linears


def test_a_gate_without_experts_beside_it_is_a_linear():
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(96, 96)
    assert "model.layers.0.mlp.gate" in walk(model).linears


def test_a_router_that_is_a_plain_linear_is_a_router():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.gate = nn.Linear(96, 4, bias=False)
    found = walk(model)
    assert "model.layers.0.mlp.gate.weight" in found.routers
    assert by_layer(found.linears) == LINEARS["mixtral"]


def test_what_nothing_knows_is_kept_apart():
    model = tiny_model("llama")
    model.model.layers[1].mlp.strange = nn.Parameter(torch.zeros(3, 4))
    assert list(walk(model).others) == ["model.layers.1.mlp.strange"]


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_matrices_are_views_that_multiply_from_the_left(architecture):
    model = tiny_model(architecture)
    found, views = walk(model), matrices(model)
    assert len(views) == len(found.linears) + 4 * len(found.experts)
    config = model.config
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    prefix = "model.layers.1.mlp.experts"
    assert views[f"{prefix}.gate_up_proj.3"].shape == (2 * inner, config.hidden_size)
    assert views[f"{prefix}.down_proj.0"].shape == (config.hidden_size, inner)
    parameter = found.experts[f"{prefix}.down_proj"]
    views[f"{prefix}.down_proj.2"][5, 7] = 9
    assert (parameter[2, 7, 5] if architecture == "gpt_oss" else parameter[2, 5, 7]) == 9


def test_experts_of_unknown_orientation_are_kept_apart():
    model = tiny_model("mixtral")
    del model.model.layers[0].mlp.experts.is_transposed
    assert "model.layers.0.mlp.experts.down_proj" in walk(model).others


def test_layers_come_in_order():
    model = tiny_model("gemma3")
    assert list(decoder_layers(model)) == list(model.model.layers)


def test_a_model_without_decoder_layers():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(BitassayError, match=r"LlamaForCausalLM: found no decoder layers"):
        walk(model)

"""The walk finds every matrix of the decoder layers, exactly once, in every architecture."""

import pytest
import torch
from torch import nn

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, walk
from bitassay.testing.tiny import ARCHITECTURES, tiny_model

LAYERS = 3
# Per layer: attention q, k, v, o, and a dense MLP's gate, up, down; a mixture has fused gate_up and down
# instead, and Qwen2-MoE a dense shared expert beside them with a gate of its own.
LINEARS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3"), 7) | {
    "qwen2_moe": 7,
    "qwen3_moe": 4,
    "mixtral": 4,
}
EXPERTS = {"qwen2_moe": 2, "qwen3_moe": 2, "mixtral": 2}
ROUTERS = {"qwen2_moe": 2, "qwen3_moe": 1, "mixtral": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_is_in_one_bin(architecture):
    model = tiny_model(architecture)
    found = walk(model)
    assert len(found.linears) == LAYERS * LINEARS[architecture]
    assert len(found.experts) == LAYERS * EXPERTS.get(architecture, 0)
    assert len(found.routers) == LAYERS * ROUTERS.get(architecture, 0)
    assert not found.others
    matrices = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim >= 2}
    bins = [[f"{name}.weight" for name in found.linears], found.experts, found.routers]
    assert sorted(name for each in bins for name in each) == sorted(matrices)


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
    assert len(found.linears) == LAYERS * LINEARS["mixtral"]


def test_what_nothing_knows_is_kept_apart():
    model = tiny_model("llama")
    model.model.layers[1].mlp.strange = nn.Parameter(torch.zeros(3, 4))
    assert list(walk(model).others) == ["model.layers.1.mlp.strange"]


def test_layers_come_in_order():
    model = tiny_model("gemma3")
    assert list(decoder_layers(model)) == list(model.model.layers)


def test_a_model_without_decoder_layers():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(BitassayError, match=r"LlamaForCausalLM: found no decoder layers"):
        walk(model)

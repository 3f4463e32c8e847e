"""GPT-2's Conv1D is read as the linear that it is, and stored as files have it."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import bitassay
from bitassay.errors import BitassayError
from bitassay.models.transposed import TransposedLinear, as_linears
from bitassay.models.walk import matrices, walk
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import with_tensors
from bitassay.testing.architectures import save_tiny

IDS = torch.arange(3, 35)[None]
W4 = Recipe.model_validate({"name": "w4", "weights": {"format": "int4", "granularity": "g32"}})


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module", params=["gpt2", "openai-gpt"])
def stored(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def base_of(stored):
    return bitassay.load(stored, attention="eager")


def test_a_linear_computes_what_conv1d_does():
    module = nn.Sequential(Conv1D(6, 4))
    nn.init.normal_(module[0].bias)
    x, before = torch.randn(3, 4), dict(module.state_dict())
    expected = module(x)
    as_linears(module)
    assert isinstance(module[0], TransposedLinear)
    assert module[0].weight.shape == (6, 4)
    torch.testing.assert_close(module(x), expected)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    other = nn.Sequential(Conv1D(6, 4))
    as_linears(other)
    other.load_state_dict(before)
    assert torch.equal(other[0].weight, module[0].weight)


def test_a_shared_module_stays_shared():
    shared = Conv1D(4, 4)
    module = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    as_linears(module)
    assert module["a"] is module["b"]["c"]


def test_every_matrix_is_found(stored):
    found = walk(base_of(stored))
    assert len(found.linears) == 8
    assert not found.others
    assert all(view.shape[1] in (64, 96, 256) for view in matrices(base_of(stored)).values())


def test_what_is_left_alone_is_stored_as_it_was(stored, tmp_path):
    base = base_of(stored)
    recipe = Recipe.model_validate(
        {
            "name": "some",
            "weights": {"format": "int4", "granularity": "g32"},
            "activations": {"format": "int8"},
            "overrides": [{"match": "*.c_proj", "weights": None}],
        }
    )
    quantized = bitassay.quantize(base, recipe)
    save(quantized, tmp_path / "out")
    again = bitassay.load(tmp_path / "out", attention="eager")
    assert torch.equal(logits(again), logits(quantized))


def test_the_folder_is_ours_and_says_why(stored, tmp_path):
    base = base_of(stored)
    plan = plan_export(base, W4)
    assert plan.layout == "bitassay"
    assert "[in, out]" in plan.layout_reason
    fake = bitassay.quantize(base, W4)
    real = with_tensors(base, fake.quantization, packed=True)
    for name, model in (("fake", fake), ("real", real)):
        save(model, tmp_path / name)
        assert torch.equal(logits(bitassay.load(tmp_path / name, attention="eager")), logits(fake))
        with pytest.raises(ValueError, match="quant_method"):
            AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with pytest.raises(BitassayError, match=r"\[in, out\]"):
            save(model, tmp_path / "never", layout="compressed-tensors")

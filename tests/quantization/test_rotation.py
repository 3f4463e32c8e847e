"""Rotations leave a model's logits as they are: in fp64, to the last digits."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

import bitassay
from bitassay.errors import BitassayError
from bitassay.models.walk import walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.transforms import Rotation
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.quantization.transforms.rotation import add_online, changed_parameters, rotate
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 23)[None]
SHAPES = {576: (9, 3), 640: (10, 2), 896: (14, 2), 1024: (16, 8), 1536: (12, 2)}
EXPERTS = ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"]
EVERYTHING = Rotation(r4=True)


class ExactNorm(nn.Module):
    """RMSNorm in the model's own dtype: transformers' computes in fp32 whatever it is given."""

    def __init__(self, norm: nn.Module, offset: float):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def varied(model):
    """In fp64, with gains and biases that are not what initialisation leaves, so that losing one shows."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "bias" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in name:
            parameter *= 2
    model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            offset = float("Gemma" in type(module).__name__)
            setattr(model.get_submodule(parent), child, ExactNorm(module, offset))
    return model


def small(architecture: str, hidden: int = 96, **changes):
    heads, shared = SHAPES.get(hidden, (4, 2))
    shape = {"hidden_size": hidden, "head_dim": hidden // heads, "num_attention_heads": heads}
    return tiny_model(
        architecture,
        **(shape | {"num_key_value_heads": shared, "vocab_size": 96, "num_hidden_layers": 2} | changes),
    )


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def difference(model, rotation, tokens=None) -> float:
    before, changed = logits(model), copy.deepcopy(model)
    rotate(changed, rotation, tokens)
    first, turned = walk(model).linears, walk(changed).linears
    assert any(not torch.allclose(first[name].weight, turned[name].weight) for name in first)
    return (logits(changed) - before).abs().max().item()


@pytest.mark.sample(6)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("hidden", SHAPES)
def test_fp64_logits_stay(hidden, architecture, tied):
    model = varied(small(architecture, hidden, tie_word_embeddings=tied))
    assert difference(model, EVERYTHING) < 1e-8
    assert logits(model).std() > 0.05


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "orthogonal", "refined"])
@pytest.mark.parametrize(
    "parts",
    [
        {"r1": "folded", "r2": False},
        {"r1": None, "r2": True},
        {"r1": None, "r2": False, "r4": True},
        {"r1": "online"},
        {"r1": "online", "r2": False, "layers": (0, 2)},
        {"r1": "online", "r4": True, "layers": (1, 2)},
        {"r1": None, "r4": True, "layers": (1,)},
    ],
)
def test_each_part_alone_and_together(kind, parts):
    if kind == "refined" and parts["r1"] != "folded":
        with pytest.raises(ValidationError, match="refined"):
            Rotation(kind=kind, **parts)
        return
    model = varied(small("qwen2", num_hidden_layers=4))
    assert difference(model, Rotation(kind=kind, rounds=2, **parts), IDS) < 1e-8


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", *EXPERTS])
def test_other_architectures(architecture):
    shape = {"head_dim": 8, "num_key_value_heads": 4} if architecture == "deepseek_v2" else {}
    model = varied(small(architecture, **shape))
    model.set_experts_implementation("eager")  # the only one that takes fp64
    # Routers weigh experts by a softmax in fp32.
    limit = 1e-5 if architecture in EXPERTS else 1e-8
    assert difference(model, Rotation()) < limit
    assert difference(model, Rotation(r1="online", layers=(1,))) < limit


def test_layers_that_are_not_chosen_stay():
    model = varied(small("llama", num_hidden_layers=3))
    changed = copy.deepcopy(model)
    rotate(changed, Rotation(r1="online", r4=True, layers=(1,)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, changed.get_parameter(name)) == (".layers.1." not in name), name


def test_no_layers_means_no_change():
    model = varied(small("llama"))
    changed = copy.deepcopy(model)
    rotate(changed, Rotation(layers="none"))
    assert all(torch.equal(p, changed.get_parameter(name)) for name, p in model.named_parameters())
    assert not Rotation(layers="none", r4=True).online


def test_online_keeps_the_embedding_tied():
    model = small("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    rotate(model, Rotation(r1="online"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)
    assert model.config.tie_word_embeddings


def test_a_model_that_shares_the_parameters_stays_as_it_is():
    base = small("qwen2", tie_word_embeddings=True)
    kept = {name: p.clone() for name, p in base.named_parameters()}
    copied = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    rotate(copied, EVERYTHING)
    assert all(torch.equal(p, kept[name]) for name, p in base.named_parameters())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not base.model.layers[0].mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize("r1", ["folded", "online"])
def test_a_model_in_16_bits_is_rotated_in_fp32(r1):
    base = small("qwen2", tie_word_embeddings=True).to(torch.bfloat16)
    draft = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    rotate(draft, Rotation(r1=r1))
    assert {p.dtype for p in draft.parameters()} == {torch.float32}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert (draft.lm_head.weight is draft.model.embed_tokens.weight) == (r1 == "online")
    exact = copy.deepcopy(base).float()
    assert (logits(draft) - logits(exact)).abs().max() < 1e-4
    assert ("model.embed_tokens.weight" in changed_parameters(base, draft)) == (r1 == "folded")


def test_outliers_spread():
    model = small("llama")
    model.model.embed_tokens.weight[:, 7] *= 50
    model.model.layers[0].self_attn.q_proj.weight[:, 7] *= 50

    def peak(m):
        w = m.model.layers[0].self_attn.q_proj.weight
        return (w.abs().amax() / w.square().mean().sqrt()).item()

    before = peak(model)
    rotate(model, Rotation())
    assert peak(model) < before / 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_folded_model_is_a_plain_one_that_transformers_reloads(tmp_path, tied):
    model = small("qwen2", tie_word_embeddings=tied)
    expected = logits(model)
    rotate(model, Rotation())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(reloaded), logits(model))
    assert (logits(reloaded) - expected).abs().max() < 1e-4
    assert not reloaded.config.tie_word_embeddings


@pytest.mark.parametrize("rotation", [EVERYTHING, Rotation(r1="online", r4=True, layers=(0, 2))])
@pytest.mark.parametrize("packed", [False, True])
def test_quantized_copies_turn_at_run_time(rotation, packed):
    base = small("llama", num_hidden_layers=3, tie_word_embeddings=True)
    work = copy.deepcopy(base)
    rotate(work, rotation)
    recipe = Recipe(name="w8", weights={"format": "int8"})
    tensors = {
        name: quantize_tensor(linear.weight, recipe.weights) for name, linear in walk(work).linears.items()
    }
    changed = changed_parameters(base, work)
    others = {name: p for name, p in changed.items() if name.removesuffix(".weight") not in tensors}
    assert ("lm_head.weight" in others) == (rotation.r1 == "folded")
    quantized = with_tensors(base, Quantization(recipe, tensors, others), packed=packed)
    add_online(quantized, rotation)
    once = logits(quantized)
    assert (once - logits(base)).norm() < 0.03 * logits(base).norm()
    add_online(quantized, rotation)
    assert torch.equal(logits(quantized), once)
    assert torch.equal(logits(copy.deepcopy(quantized)), once)
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    assert (logits(half).float() - once).norm() < 0.05 * once.norm()


def test_hidden_states_between_layers_can_be_put_in_again():
    """What a layer gets, as a hook sees it, gives what the next layer gets: calibration relies on it."""
    model = small("llama", num_hidden_layers=3)
    rotate(model, Rotation(r1="online", layers=(0, 1)))
    seen = []

    def keep(module, args, kwargs):
        seen.append((args[0], kwargs))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    logits(model)
    entered = list(seen)
    for layer, (hidden, kwargs), (following, _) in zip(
        model.model.layers[:-1], entered[:-1], entered[1:], strict=True
    ):
        assert torch.allclose(layer(hidden, **kwargs), following, atol=1e-5)


# Refusals


def test_gains_after_a_block_are_refused():
    model = varied(small("gemma3"))
    with pytest.raises(BitassayError, match=r"model\.layers\.0\.post_\w+_layernorm: its gains come after"):
        rotate(model, Rotation())
    assert difference(varied(small("gemma3")), Rotation(r1=None, r4=True)) < 1e-6  # rounded to fp32 in rope


def test_equal_gains_after_a_block_and_gains_above_one_are_fine():
    model = small("gemma3")
    for layer in model.model.layers:
        layer.input_layernorm.weight += 0.3 * torch.randn(96, generator=torch.Generator().manual_seed(1))
        layer.post_attention_layernorm.weight += 0.5
    model.model.norm.weight += torch.linspace(-0.5, 0.5, 96)
    before = logits(model)
    rotate(model, EVERYTHING)
    assert not model.model.norm.weight.any()
    assert (logits(model) - before).abs().max() < 1e-4


def test_layer_norm_is_refused():
    model = small("llama")
    model.model.layers[1].input_layernorm = nn.LayerNorm(96)
    with pytest.raises(BitassayError, match=r"model\.layers\.1\.input_layernorm: LayerNorm is no RMSNorm"):
        rotate(model, Rotation())


def test_fused_experts_have_no_online_rotation():
    with pytest.raises(BitassayError, match="fused experts") as caught:
        rotate(small("qwen2_moe"), EVERYTHING)
    assert "r4" in caught.value.remedy
    model = small("deepseek_v2", head_dim=8, num_key_value_heads=4)  # its first layer has no experts
    assert difference(model, Rotation(r1=None, r4=True, layers=(0,))) < 1e-4


@pytest.mark.parametrize(
    ("where", "what"),
    [("model", "extra"), ("model.layers.1.mlp", "extra_proj")],
)
def test_matrices_without_a_known_role_are_refused(where, what):
    model = small("llama")
    setattr(model.get_submodule(where), what, nn.Linear(96, 96))
    with pytest.raises(BitassayError, match=rf"{where}\.{what}.*: no known role"):
        rotate(model, Rotation())


def test_something_between_values_and_output_is_noticed():
    model = small("llama")
    for layer in model.model.layers:
        attention = layer.self_attn.o_proj
        attention.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(0, 2, 96),))
    with pytest.raises(BitassayError, match="its logits differ"):
        rotate(model, Rotation(r1=None))
    rotate(small("llama"), Rotation(r1=None))


def test_sizes_without_a_hadamard_matrix():
    odd = {"hidden_size": 92, "head_dim": 24}
    with pytest.raises(BitassayError, match="order 92") as caught:
        rotate(small("llama", **odd), Rotation())
    assert "without_hadamard" in caught.value.remedy
    for way in ("orthogonal", "blocks"):
        assert difference(varied(small("llama", **odd)), Rotation(without_hadamard=way)) < 1e-8


@pytest.mark.parametrize(
    "parts",
    [
        {"r1": None, "r2": False},
        {"layers": (0,)},
        {"kind": "refined", "r1": "online"},
        {"kind": "hadamrad"},
        {"seeed": 1},
    ],
)
def test_recipes_that_make_no_sense(parts):
    with pytest.raises(ValidationError):
        Rotation(**parts)


def test_a_layer_that_does_not_exist():
    with pytest.raises(BitassayError, match="no layer 7"):
        rotate(small("llama"), Rotation(r1=None, layers=(0, 7)))


def test_refined_needs_text():
    with pytest.raises(BitassayError, match="calibration"):
        rotate(small("llama"), Rotation(kind="refined"))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("rotation", [EVERYTHING, Rotation(r1="online")])
def test_a_real_model_stays_the_same(rotation):
    model = bitassay.load("smollm2-135m", dtype=torch.float32)
    ids = torch.arange(100, 164)[None]
    before = logits(model, ids)
    rotate(model, rotation)
    assert (logits(model, ids) - before).abs().max() < 1e-3

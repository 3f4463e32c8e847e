import copy

import pytest
import torch

import bitassay
from bitassay.errors import BitassayError
from bitassay.models.walk import walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe, WeightScheme, shipped_recipes
from bitassay.quantization.runtime.kernels import MAX_ROWS
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.model import bits_per_weight, parameter_count, size_bytes, with_tensors
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 23)[None]
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def scheme_of(name: str) -> WeightScheme:
    """A format in groups of 64, or in its own."""
    own = FORMATS[name].fixed_group
    return WeightScheme(format=name, **({} if own else {"granularity": "g64"}))


@pytest.mark.sample(5)
@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.levels is None])
def test_fake_and_real_models_give_the_same_logits(architecture, name):
    base = tiny_model(architecture)
    recipe = Recipe(name=name, weights=scheme_of(name))
    fake = bitassay.quantize(base, recipe)
    real = bitassay.quantize(base, recipe, packed=True)
    assert torch.equal(logits(fake), logits(real))
    assert not torch.equal(logits(fake), logits(base))
    assert sum(isinstance(module, QuantizedLinear) for module in real.modules()) == len(walk(base).linears)


def test_the_base_stays_as_it_is_and_the_rest_is_shared(stories):
    before = {name: p.clone() for name, p in stories.named_parameters()}
    quantized = bitassay.quantize(stories, "w2")
    assert all(torch.equal(p, before[name]) for name, p in stories.named_parameters())
    assert quantized.get_input_embeddings().weight is stories.get_input_embeddings().weight
    assert quantized.lm_head.weight is quantized.get_input_embeddings().weight
    assert quantized.model.norm.weight is stories.model.norm.weight
    assert quantized.identity.recipe_name == "w2"
    assert stories.identity.recipe_name is None


@pytest.mark.parametrize("packed", [False, True])
def test_every_parameter_but_the_quantized_is_the_base_models_own(packed):
    base = tiny_model("qwen2")  # with biases, and a head of its own
    model = bitassay.quantize(base, "w4", packed=packed)
    held = {f"{name}.weight" for name in walk(base).linears}
    biases = {f"{name}.bias" for name in walk(base).linears}
    own, shared = dict(model.named_parameters()), dict(base.named_parameters())
    assert set(shared) - held == set(own) - held
    for name in set(shared) - held:
        assert own[name].data_ptr() == shared[name].data_ptr(), name
        assert name in biases or own[name] is shared[name]


def test_every_linear_of_every_layer_is_quantized(stories):
    quantized = bitassay.quantize(stories, "w4")
    for name, linear in walk(stories).linears.items():
        expected = quantize_tensor(linear.weight, quantized.quantization.recipe.weights).dequantize()
        assert torch.equal(quantized.get_submodule(name).weight, expected)


def test_overrides_apply_to_the_modules_they_name(stories):
    recipe = Recipe(
        name="mixed",
        weights={"format": "int4"},
        overrides=[
            {"match": "*.down_proj", "weights": {"format": "int8"}},
            {"match": "model.layers.0.*", "weights": None},
        ],
    )
    tensors = bitassay.quantize(stories, recipe).quantization.tensors
    assert "model.layers.0.self_attn.q_proj" not in tensors
    assert tensors["model.layers.0.mlp.down_proj"].scheme.format == "int8"
    assert tensors["model.layers.1.mlp.up_proj"].scheme.format == "int4"


@pytest.mark.parametrize("pattern", ["*.down_porj", "layers.9.*", ""])
def test_an_override_that_applies_to_nothing_is_an_error(stories, pattern):
    recipe = Recipe(name="typo", weights={"format": "int4"}, overrides=[{"match": pattern, "weights": None}])
    with pytest.raises(BitassayError, match="applies to no module") as caught:
        bitassay.quantize(stories, recipe)
    assert "proj" in str(caught.value)


def test_a_quantized_model_is_not_quantized_again(stories):
    with pytest.raises(BitassayError, match="already"):
        bitassay.quantize(bitassay.quantize(stories, "w4"), "w4")


def test_nan_weights_are_refused_by_module_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(BitassayError, match=r"model\.layers\.1\.mlp\.up_proj"):
        bitassay.quantize(model, "w8")


def test_bits_and_bytes_are_those_of_what_is_stored(stories):
    linears = walk(stories).linears.values()
    weights = sum(linear.weight.numel() for linear in linears)
    groups = sum(linear.out_features * -(-linear.in_features // 64) for linear in linears)
    quantized = bitassay.quantize(stories, "w4")
    # Whole bytes per matrix: an odd number of 4-bit zero points wastes half a byte.
    stored = (
        weights * 4
        + groups * 16
        + sum(-(-linear.out_features * -(-linear.in_features // 64) // 2) * 8 for linear in linears)
    )
    assert bits_per_weight(quantized) == stored / weights
    assert size_bytes(quantized) == stored // 8 + 2 * (parameter_count(stories) - weights)
    assert (
        size_bytes(stories)
        == 2 * parameter_count(stories)
        == 2 * sum(p.numel() for p in stories.parameters())
    )
    packed = with_tensors(stories, quantized.quantization, packed=True)
    assert parameter_count(packed) == parameter_count(quantized) == parameter_count(stories)
    assert size_bytes(packed) == size_bytes(quantized)


def test_a_real_model_follows_to_bf16():
    base = tiny_model("llama")
    real = bitassay.quantize(base, "w8", packed=True).to(torch.bfloat16)
    fake = bitassay.quantize(base, "w8").to(torch.bfloat16)
    long = torch.arange(3, 3 + MAX_ROWS + 9)[None]  # more rows than the kernels take
    with torch.inference_mode():
        assert torch.equal(real(long).logits, fake(long).logits)


def test_a_decode_step_uses_the_kernel_and_a_bias():
    base = tiny_model("qwen2").to(torch.bfloat16)  # q, k and v have biases
    for layer in base.model.layers:
        layer.self_attn.q_proj.bias.fill_(0.5)
    fake, real = bitassay.quantize(base, "w4"), bitassay.quantize(base, "w4", packed=True)
    q_proj = real.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 2, base.config.hidden_size).bfloat16()
    expected = fake.model.layers[0].self_attn.q_proj(x)
    torch.testing.assert_close(q_proj(x), expected, rtol=0.03, atol=0.03)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.levels is None])
def test_to_bf16_equals_quantizing_the_bf16_model(name):
    half = tiny_model("llama").to(torch.bfloat16)
    whole = copy.deepcopy(half).float()  # the same weights in another dtype
    recipe = Recipe(name=name, weights=scheme_of(name))
    moved = bitassay.quantize(whole, recipe, packed=True).to(torch.bfloat16)
    made = bitassay.quantize(half, recipe, packed=True)
    assert torch.equal(logits(moved), logits(made))  # few rows: the kernels, where there are some
    long = torch.arange(3, 3 + MAX_ROWS + 9)[None]
    with torch.inference_mode():
        assert torch.equal(moved(long).logits, bitassay.quantize(half, recipe)(long).logits)


@pytest.mark.slow
@pytest.mark.real
def test_real_and_fake_agree_on_a_real_model():
    base = bitassay.load("smollm2-135m", dtype=torch.float32)
    tokens = torch.arange(100, 164)[None]
    for recipe in shipped_recipes().values():
        if recipe.is_calibrated:  # as exact, and slow
            continue
        fake = bitassay.quantize(base, recipe)
        with torch.inference_mode():
            dense = fake(tokens).logits
            packed = with_tensors(base, fake.quantization, packed=True)(tokens).logits
        assert torch.equal(dense, packed), f"{recipe.name}: {(dense - packed).abs().max()}"

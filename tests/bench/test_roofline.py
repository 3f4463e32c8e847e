"""Bytes and operations against counts by hand, and limits that are positive."""

import pytest
import torch

import bitassay
from bitassay.bench.roofline import Cost, matrices_of, matrix_peak, product_dtype, stream_bandwidth
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.testing.tiny import tiny_model

CPU = torch.device("cpu")


def test_the_bound_is_the_slower_of_two():
    assert Cost(100, 50).bound_s(bandwidth=10, peak=1000) == 10
    assert Cost(100, 50).bound_s(bandwidth=1000, peak=10) == 5
    assert Cost(100, 50).flop_per_byte == 0.5


def test_every_weight_of_a_dense_model_is_read_once(stories):
    """Its embedding is also its head, so all parameters are read."""
    found = matrices_of(stories)
    parameters = sum(p.numel() for p in stories.parameters())
    assert found.token_bytes == parameters * 4
    assert found.body_weights + found.head_weights == parameters
    assert found.head_weights == stories.get_output_embeddings().weight.numel()
    config = stories.config
    attention = (
        4
        * config.num_hidden_layers
        * config.num_attention_heads
        * (config.hidden_size // config.num_attention_heads)
    )
    assert found.decode(3, 10, 1000).bytes == parameters * 4 + 1000
    assert found.decode(3, 10, 1000).flop == 2 * 3 * parameters + attention * 30
    prefill = found.prefill(2, 5)
    assert prefill.flop == 2 * (10 * found.body_weights + 2 * found.head_weights) + attention * 2 * 15
    assert prefill.bytes == parameters * 4


def test_an_embedding_that_is_not_the_head_is_not_read():
    model = tiny_model("llama", tie_word_embeddings=False)
    found = matrices_of(model)
    assert found.token_bytes == 4 * (
        sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    )


@pytest.mark.parametrize("packed", [True, False])
def test_codes_are_read_as_they_are_stored(stories, packed):
    model = bitassay.quantize(stories, "w4", packed=packed)
    tensors = model.quantization.tensors.values()
    stored = sum(t.stored_bits for t in tensors) / 8
    dense = sum(p.numel() for p in stories.parameters()) - sum(t.shape[0] * t.shape[1] for t in tensors)
    found = matrices_of(model)
    assert found.token_bytes == pytest.approx(stored + 4 * dense)
    assert found.body_weights + found.head_weights == sum(p.numel() for p in stories.parameters())


@pytest.mark.parametrize("quantized", [True, False])
def test_a_mixture_reads_the_experts_that_tokens_reach(quantized):
    base = tiny_model("qwen3_moe")
    model = bitassay.quantize(base, "w8", packed=True) if quantized else base
    found = matrices_of(model)
    weights = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    assert found.expert_weights == weights
    assert found.reached == 2 / 4
    one, two = found.decode(1, 1, 0).bytes, found.decode(2, 1, 0).bytes
    assert one == pytest.approx(found.body_bytes + found.head_bytes + found.expert_bytes / 2)
    assert two == pytest.approx(found.body_bytes + found.head_bytes + found.expert_bytes * 3 / 4)


def test_the_dtype_of_products(stories):
    both = Recipe.model_validate(
        {"name": "w8a8", "weights": {"format": "int8", "granularity": "channel"}, "activations": {}}
    )
    assert product_dtype(stories) == "float32"
    assert product_dtype(bitassay.quantize(stories, "w8", packed=True)) == "float32"
    assert product_dtype(bitassay.quantize(stories, both, packed=True)) == "int8"


def test_limits_are_measured():
    assert stream_bandwidth(CPU, 2**20) > 0
    assert matrix_peak("float32", CPU, (8, 16, 16)) > 0
    assert matrix_peak("int8", CPU, (8, 16, 16)) > 0
    assert matrix_peak("fp8", CPU) is None

"""What models keep, and what may be done with it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bitassay.errors import BitassayError
from bitassay.models.cache import (
    behind,
    copy_rows,
    keeps_positions,
    last_positions,
    reads_on,
    select_rows,
    stored_bytes,
    takes_cache,
)
from bitassay.quantization.inputs.kv_cache import cache_to_crop, empty_cache
from bitassay.testing.tiny import stories260k, tiny_model
from kinds import HYBRID, tiny_kind

TOKENS = torch.arange(5, 45)[None]


def test_attention_keeps_positions():
    for name in ("llama", "gemma3", "deepseek_v2"):
        model = tiny_model(name)
        assert takes_cache(model)
        assert keeps_positions(model)
        assert reads_on(model)


@pytest.mark.parametrize(
    "name",
    [
        "lfm2",
        "mamba",
        *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(HYBRID.keys() - {"lfm2", "mamba"})),
    ],
)
def test_a_state_keeps_no_positions(name):
    model = tiny_kind(name)
    assert takes_cache(model)
    assert not keeps_positions(model)
    with pytest.raises(BitassayError, match="state"):
        cache_to_crop(model)


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRID)
def test_reading_on_is_right_where_it_is_said_to_be(name):
    model, cache = tiny_kind(name), empty_cache(tiny_kind(name))
    wanted = model(input_ids=TOKENS, use_cache=False).logits[:, 30:]
    first, rest = TOKENS.split([30, 10], dim=1)
    model(input_ids=first, **behind(model, cache, 0, first))
    found = model(input_ids=rest, **behind(model, cache, 30, rest)).logits
    assert reads_on(model) == (((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-5)


@torch.no_grad()
def test_learned_positions_go_on_behind_a_cache():
    """They are absolute: rotary ones say the same if all are off by as much."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    cache, begun, pieces = empty_cache(model), 0, []
    for piece in TOKENS.split([30, 1, 9], dim=1):
        pieces.append(model(input_ids=piece, **behind(model, cache, begun, piece)).logits)
        begun += piece.shape[1]
    assert torch.allclose(torch.cat(pieces, 1), model(input_ids=TOKENS, use_cache=False).logits, atol=1e-5)


def test_in_few_bits_reading_on_is_not_tried():
    assert reads_on(tiny_kind("lfm2"))
    assert not reads_on(tiny_kind("lfm2").bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_rows_are_copies(name):
    model = tiny_kind(name)
    cache, one = empty_cache(model), TOKENS[:, :30]
    model(input_ids=one, **behind(model, cache, 0, one))
    size = stored_bytes(cache)
    for _ in range(2):  # what is read behind a copy leaves no trace
        rows, rest = copy_rows(cache, [0, 0, 0], model.device), TOKENS[:, 30:].repeat(3, 1)
        found = model(input_ids=rest, **behind(model, rows, 30, rest)).logits
        wanted = model(input_ids=TOKENS, use_cache=False).logits[:, 30:]
        assert torch.allclose(found, wanted.expand_as(found), atol=1e-5)
    select_rows(rows, [0], model.device)
    assert stored_bytes(cache) == size < stored_bytes(rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("count", [1, 3])
def test_logits_of_the_last_positions(architecture, count):
    model = tiny_model(architecture)
    ids = torch.arange(10).reshape(2, 5)
    last = last_positions(count, model.device)
    with torch.inference_mode():
        assert torch.allclose(
            model(ids, logits_to_keep=last).logits, model(ids).logits[:, -count:], atol=1e-6
        )


@pytest.mark.parametrize(("last", "times"), [(1, 1), (last_positions(1, torch.device("cpu")), 0)])
def test_the_head_is_not_repeated_for_each_sequence(last, times):
    """A number makes torch do so: with that gone, this module can go."""
    model = stories260k()  # loaded: its weights want no gradients
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as found:
        model(torch.arange(10).reshape(2, 5), logits_to_keep=last)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    products = [event.input_shapes for event in found.events() if event.name == "aten::bmm"]
    assert sum([2, hidden, vocabulary] in shapes for shapes in products) == times

"""Looped layers: the formulas, stopping, slots in the cache."""

import pytest
import torch
from transformers import DynamicCache

from bitassay.engines.decode import generate
from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers
from bitassay.quantization.inputs.kv_cache import empty_cache
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import Steps, Stop
from bitassay.quantization.runtime.looped_layers import LoopedForward, Usage, dynamic, parallel, serial
from bitassay.quantization.runtime.model import quantization_of, with_tensors
from bitassay.testing.tiny import tiny_model

IDS = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
INT4 = {"format": "int4", "granularity": "g32"}
INT2 = {"format": "int2", "granularity": "g32"}


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def recipe(replication=None, weights=INT4, **parts):
    return Recipe.model_validate({"name": "x", "weights": weights, "replication": replication} | parts)


def logits(model, **options):
    with torch.inference_mode():
        return model(IDS, **options).logits


def stepwise(model, cache):
    """Logits of the text read in one piece of 7 tokens, then token by token."""
    with torch.inference_mode():
        pieces = [IDS[:, :7], *(IDS[:, t : t + 1] for t in range(7, 20))]
        return torch.cat([model(p, past_key_values=cache, use_cache=True).logits for p in pieces], 1)


def test_serial_and_parallel_are_their_formulas():
    x = states(1, 3, 8)
    f = [lambda x: x + torch.tanh(x), lambda x: x + x.square()]
    steps = Steps((0.9, 1.0), (0.5, 0.25))
    first = 0.9 * x + 0.5 * torch.tanh(x)
    torch.testing.assert_close(serial(x, f, steps), first + 0.25 * first.square())
    torch.testing.assert_close(
        parallel(x, f, steps), 0.9 * x + 0.5 * torch.tanh(x) + 0.25 * x.square(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("combine", [serial, parallel])
def test_one_plain_pass_is_the_layer_to_the_bit(combine):
    x = states(1, 3, 8)
    y = x * 1e-3 + 0.3
    assert not torch.equal(x + (y - x), y)  # what the formula alone would give
    assert torch.equal(combine(x, [lambda _: y], Steps((1.0,), (1.0,))), y)


def test_a_token_stops_when_little_changes_or_its_budget_is_spent():
    x = torch.ones(1, 3, 4)
    growth = torch.tensor([[[1.0], [1.01], [2.0]]])

    def run(stop):
        usage, rest = Usage(), []
        usage.begin(x)
        y = dynamic(
            x,
            [lambda x: x * growth] * 3,
            Steps((1.0,) * 3, (1.0,) * 3),
            stop,
            usage,
            lambda _, n: rest.append(n),
        )
        return y[0, :, 0].tolist(), usage.spent.tolist(), rest

    grown, spent, rest = run(Stop(cosine=0.1, norm=0.05))
    assert grown == pytest.approx([1, 1.01, 8])
    assert spent == [[0, 0, 2]]
    assert rest == []
    grown, spent, rest = run(Stop(cosine=0.1, norm=0.05, budget=1))
    assert grown == pytest.approx([1, 1.01, 4])
    assert rest == [2]  # every token had stopped before the third pass
    grown, _, rest = run(Stop(cosine=0.1, norm=1.5))
    assert (grown, rest) == (pytest.approx([1, 1.01, 2]), [1])
    # A state that turns goes on, however little its length changes.
    usage = Usage()
    usage.begin(x)
    dynamic(
        x, [lambda x: -x] * 2, Steps((1.0,) * 2, (1.0,) * 2), Stop(cosine=0.5, norm=3), usage, lambda *_: None
    )
    assert usage.spent.tolist() == [[1, 1, 1]]


def test_usage_adds_forwards_up():
    usage = Usage()
    for spent in (3, 5):
        usage.begin(states(1, 4, 2))
        usage.spent = torch.full((1, 4), spent)
        usage.end()
    assert usage.passes_per_token == 4
    usage.clear()
    assert usage.passes_per_token == 0


@pytest.mark.parametrize("packed", [False, True])
def test_replication_by_one_is_no_replication_to_the_bit(stories, packed):
    once, none = (quantize(stories, recipe(r), packed=packed) for r in ({"copies": 1}, None))
    assert torch.equal(logits(once), logits(none))
    assert torch.equal(stepwise(once, empty_cache(once)), stepwise(none, empty_cache(none)))
    texts = [generate(model, [[5, 6, 7]], max_new_tokens=12) for model in (once, none)]
    assert texts[0] == texts[1]
    # A layer with a single pass through `LoopedForward` is the layer too.
    layer = decoder_layers(once)[1]
    layer.forward = LoopedForward([[layer.forward]], Steps((1.0,), (1.0,)), first_slot=5)
    assert torch.equal(logits(once), logits(none))


PLANS = {
    "plain": {"copies": 2},
    "damped": {"copies": 3, "coefficients": "mean"},
    "some layers": {"copies": 3, "layers": {1: 2, 3: 3}},
    "dynamic": {"copies": 3, "stop": {"cosine": 0.002, "norm": 0.2}},
    "budget": {"copies": 3, "stop": {"cosine": 0, "norm": 0, "budget": 3}},
    "own codes": {"copies": 2, "differ": "seed", "coefficients": "mean"},
    "parallel": {"copies": 2, "how": "parallel", "differ": "offset"},
    "block": {"copies": 3, "of": "block", "layers": [1, 2, 3], "coefficients": [1, 0.2, 0.1]},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_generation_with_a_cache_says_what_one_forward_says(stories, plan):
    model = quantize(stories, recipe(plan))
    whole = logits(model, use_cache=False)
    cache = empty_cache(model)
    torch.testing.assert_close(stepwise(model, cache), whole, rtol=1e-4, atol=2e-4)
    extra = sum(steps.count - 1 for steps in quantization_of(model).passes.values())
    assert len(cache.layers) == 5 + extra
    assert all(layer.keys.shape[2] == 20 for layer in cache.layers)
    torch.testing.assert_close(stepwise(model, DynamicCache()), whole, rtol=1e-4, atol=2e-4)
    ours = generate(model, [IDS[0].tolist()], max_new_tokens=8)[0].output_ids
    theirs = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)[0, 20:]
    assert list(ours) == theirs.tolist()


def test_passes_attend_to_what_the_same_pass_made_of_earlier_tokens(stories):
    """By brute force: a layer with two passes is two layers of a deeper model."""
    plain, twice = quantize(stories, recipe()), quantize(stories, recipe({"layers": [2]}))
    layers = decoder_layers(plain)
    copied = with_tensors(stories, quantization_of(plain))
    second = decoder_layers(copied)[2]
    second.self_attn.layer_idx = 5
    layers.insert(3, second)
    plain.config.num_hidden_layers = 6
    assert torch.equal(logits(twice, use_cache=False), logits(plain, use_cache=False))


def test_a_block_that_runs_again_is_a_deeper_model(stories):
    """By brute force: layers 1, 2, 1, 2; and as one step around both."""
    plan = {"of": "block", "layers": [1, 2]}
    plain, looped = quantize(stories, recipe()), quantize(stories, recipe(plan))
    layers = decoder_layers(plain)
    copied = decoder_layers(with_tensors(stories, quantization_of(plain)))
    for place, layer in enumerate((copied[1], copied[2])):
        layer.self_attn.layer_idx = 5 + place
        layers.insert(3 + place, layer)
    plain.config.num_hidden_layers = 7
    assert torch.equal(logits(looped, use_cache=False), logits(plain, use_cache=False))
    # Weighed by nothing, further passes change nothing; by something, not what layer after layer does.
    once = quantize(stories, recipe())
    assert torch.equal(logits(quantize(stories, recipe(plan | {"coefficients": [1, 0]}))), logits(once))
    apart = quantize(stories, recipe({"layers": [1, 2]}))
    assert not torch.allclose(logits(apart), logits(looped), atol=0.1)


def test_a_block_of_layers_that_attend_in_different_ways_is_refused():
    base = tiny_model("gemma3", sliding_window=8, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    quantize(base, recipe({"of": "block", "layers": [0, 1]}))
    with pytest.raises(BitassayError, match="different ways"):
        quantize(base, recipe({"of": "block"}))


def test_a_rounded_cache_rounds_every_slot_once(stories):
    plan = {"copies": 2, "coefficients": "mean"}
    model = quantize(
        stories, recipe(plan, kv_cache={"format": "int8", "granularity": "g8", "symmetric": False})
    )
    whole, cache = logits(model, use_cache=False), empty_cache(model)
    torch.testing.assert_close(stepwise(model, cache), whole, rtol=1e-4, atol=2e-4)
    assert len(cache.layers) == 10
    assert cache.layers[7].keys.dtype == torch.uint8


def test_sliding_windows_have_slots_of_their_kind():
    base = tiny_model(
        "gemma3",
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"],
    )
    model = quantize(base, recipe({"copies": 2, "coefficients": "mean"}))
    cache = empty_cache(model)
    torch.testing.assert_close(stepwise(model, cache), logits(model, use_cache=False), rtol=1e-4, atol=2e-4)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds[3:] == kinds[:3]


def test_stopped_tokens_cost_what_usage_says(stories):
    model = quantize(stories, recipe({"copies": 3, "stop": {"cosine": 0, "norm": 0, "budget": 2}}))
    logits(model)
    assert model.replication_usage.passes_per_token == 2
    free = quantize(stories, recipe({"copies": 3, "stop": {"cosine": 0, "norm": 0}}))
    logits(free)
    assert free.replication_usage.passes_per_token == 10
    assert torch.equal(logits(free), logits(quantize(stories, recipe({"copies": 3}))))


def test_passes_that_nobody_needs_are_not_run(stories):
    model = quantize(stories, recipe({"copies": 3, "stop": {"cosine": 2, "norm": 1e9}}))
    calls = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    plain = quantize(stories, recipe())
    cache = empty_cache(model)
    torch.testing.assert_close(stepwise(model, cache), stepwise(plain, empty_cache(plain)))
    assert len(calls) == 14 * 5  # one pass a forward and layer
    assert cache.layers[9].keys.shape[2] == 20  # and yet all slots are filled


def test_layers_without_attention_are_refused(stories):
    base = tiny_model("llama")
    for layer in decoder_layers(base):
        layer.attention = layer._modules.pop("self_attn")
    with pytest.raises(BitassayError, match="no self_attn"):
        quantize(base, recipe({"copies": 2}))

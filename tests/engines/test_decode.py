import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitassay.engines.decode import (
    CACHED_ROWS,
    end_tokens,
    generate,
    left_pad,
    prefill,
    token_batches,
    until_end,
)
from bitassay.engines.sampling import Sampler
from bitassay.engines.taps import record_states, tap_layers
from bitassay.errors import BitassayError
from bitassay.models.positions import context_length
from bitassay.testing.tiny import tiny_model

PROMPTS = [[1, 403, 407], [1, 300, 12, 44, 90, 31, 7], [1, 422]]


def transformers_greedy(model, prompt, count):
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tuple(tokens[0, len(prompt) :].tolist())


@pytest.mark.parametrize("architecture", [None, "qwen2", "qwen3", "gemma3", "mistral", "qwen3_moe"])
def test_greedy_gives_the_tokens_of_transformers_generate(architecture, stories):
    model = tiny_model(architecture) if architecture else stories
    for one, prompt in zip(generate(model, PROMPTS, max_new_tokens=20), PROMPTS, strict=True):
        assert one.output_ids == transformers_greedy(model, prompt, 20)


def test_a_batch_gives_what_single_prompts_give(stories):
    sampler, nonces, layers = Sampler(0.9, 0.95, 11), ["a", "b", "c"], (2, 5)
    together = generate(stories, PROMPTS, max_new_tokens=12, sampler=sampler, nonces=nonces, layers=layers)
    for one, prompt, nonce in zip(together, PROMPTS, nonces, strict=True):
        (alone,) = generate(
            stories, [prompt], max_new_tokens=12, sampler=sampler, nonces=[nonce], layers=layers
        )
        assert one.output_ids == alone.output_ids
        for layer in layers:
            assert torch.allclose(one.states[layer], alone.states[layer], atol=1e-4, rtol=1e-4)


def test_seeds_and_nonces_change_samples(stories):
    def run(seed, nonce):
        return generate(
            stories, [PROMPTS[2]], max_new_tokens=12, sampler=Sampler(3.0, seed=seed), nonces=[nonce]
        )[0].output_ids

    assert run(1, "a") == run(1, "a")
    assert len({run(1, "a"), run(2, "a"), run(1, "b")}) == 3


def test_cached_states_are_those_of_one_prefill_at_the_same_positions(stories):
    layers = (1, 3, 5)
    made = generate(stories, PROMPTS, max_new_tokens=15, layers=layers)
    seen = prefill(stories, PROMPTS, [one.output_ids for one in made], layers=layers)
    for prompt, one, other in zip(PROMPTS, made, seen, strict=True):
        count = len(prompt) + len(one.output_ids) - 1
        for layer in layers:
            assert one.states[layer].shape == (count, 64)
            assert torch.allclose(one.states[layer], other.states[layer], atol=1e-4, rtol=1e-4)
            # ... and of no other position
            assert not torch.allclose(one.states[layer][1:], other.states[layer][:-1], atol=1e-2)
        assert tuple(other.logits.argmax(-1).tolist()) == one.output_ids


def test_taps_are_what_transformers_calls_hidden_states(stories):
    with torch.no_grad():
        truth = stories(torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states
    (seen,) = prefill(stories, [PROMPTS[1]], [[5]], layers=(1, 4, 5))
    assert torch.allclose(seen.states[1], truth[1][0], atol=1e-5)
    assert torch.allclose(seen.states[4], truth[4][0], atol=1e-5)
    # the last layer is tapped before the final norm, transformers lists it after
    assert not torch.allclose(seen.states[5], truth[5][0], atol=1e-2)
    assert torch.allclose(stories.model.norm(seen.states[5]), truth[5][0], atol=1e-4)


def test_sampled_layers_are_every_eighth_and_the_last():
    assert tap_layers(tiny_model("llama", num_hidden_layers=17)) == (8, 16, 17)
    assert tap_layers(tiny_model("llama", num_hidden_layers=16)) == (8, 16)
    assert tap_layers(tiny_model("llama", num_hidden_layers=3)) == (3,)


def test_taps_leave_no_hooks_behind(stories):
    before = [len(layer._forward_hooks) for layer in stories.model.layers]  # transformers may have its own
    with pytest.raises(KeyError), record_states(stories, (1, 5)):
        raise KeyError
    assert [len(layer._forward_hooks) for layer in stories.model.layers] == before
    with pytest.raises(BitassayError, match="no decoder layer 6"), record_states(stories, (6,)):
        pass


def test_generation_stops_at_the_end_token_and_the_rest_of_the_batch_goes_on(stories):
    one, two = (run.output_ids for run in generate(stories, PROMPTS[:2], max_new_tokens=10))
    stop = next(token for token in one[2:6] if token not in two)
    original = stories.generation_config.eos_token_id
    stories.generation_config.eos_token_id = [stop, 511]
    try:
        assert end_tokens(stories) == {stop, 511}
        ended, other = generate(stories, PROMPTS[:2], max_new_tokens=10, layers=(5,))
    finally:
        stories.generation_config.eos_token_id = original
    assert ended.output_ids == one[: one.index(stop) + 1]
    assert len(ended.states[5]) == len(PROMPTS[0]) + one.index(stop)
    assert other.output_ids == two
    assert len(other.states[5]) == len(PROMPTS[1]) + 9


def test_one_token_has_states_for_the_prompt_alone(stories):
    (one,) = generate(stories, [PROMPTS[0]], max_new_tokens=1, layers=(5,))
    assert len(one.output_ids) == 1
    assert len(one.states[5]) == len(PROMPTS[0])


def test_until_end_keeps_the_end_token():
    assert until_end([5, 2, 7], [2]) == [5, 2]
    assert until_end([5, 6], [2]) == [5, 6]


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(1, 300), st.integers(0, 2000))
def test_token_batches_hold_everything_and_keep_their_budget(lengths, budget, past):
    found = list(token_batches(lengths, budget, past))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        size = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or size <= budget
        assert len(batch) == 1 or size + len(batch) * past <= CACHED_ROWS * budget


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([[]], 4, "without tokens"),
        ([], 4, "without tokens"),
        ([[1, 512]], 4, "512"),
        ([[1, -3]], 4, "-3"),
        ([[1] * 510], 4, "do not fit"),
        ([[1]], 0, "max_new_tokens"),
    ],
)
def test_impossible_requests_are_refused(stories, prompts, tokens, message):
    assert context_length(stories) == 512
    with pytest.raises(BitassayError, match=message):
        generate(stories, prompts, max_new_tokens=tokens)


def test_prefill_refuses_an_empty_output(stories):
    with pytest.raises(BitassayError, match="without tokens"):
        prefill(stories, [[1, 2]], [[]])

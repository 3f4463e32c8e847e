"""Scores with shared prefixes against one plain forward for each pair, and how prefixes and batches are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitassay
import bitassay.evaluation.likelihood as module
from bitassay.evaluation.greedy import greedy_texts
from bitassay.evaluation.likelihood import (
    SHARED_TOKENS,
    common_prefixes,
    continuation_scores,
    shared_length,
)
from bitassay.quantization.recipe.recipe import Recipe, WeightScheme
from bitassay.testing.tiny import tiny_model
from kinds import HYBRID, ROTARY, SHORT, reread_greedy, tiny_kind


def plain(model, context, continuation, max_length):
    """What lm-eval's hf model does with one pair, without a cache."""
    tokens = (context + continuation)[-(max_length + 1) :][:-1]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    rows = logits[-len(continuation) :].float()
    targets = torch.tensor(continuation)
    found = rows.log_softmax(1).gather(1, targets[:, None]).sum().item()
    return found, bool((rows.argmax(1) == targets).all())


def pairs(seed=0, size=300):
    """Few-shot items: two trunks, contexts behind them, several endings each; and what is none of that."""
    draw = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, size, (length,), generator=draw).tolist()

    found = []
    for trunk in (text(80), text(50)):
        for length in (5, 9, 9, 40, 41):
            context = trunk + text(length)
            found += [(context, text(n)) for n in (1, 1, 3, 7)]
    one = text(60)
    found += [(one, [5]), (one, [6]), (one, [5, 6, 7]), ([*one, 5], [6])]
    found += [(text(1), text(30)), (text(300), text(4)), (one, [5])]
    return found


def check(model, given_pairs, max_length=200, **options):
    found = continuation_scores(model, given_pairs, max_length=max_length, **options)
    for score, (context, continuation) in zip(found, given_pairs, strict=True):
        expected, greedy = plain(model, context, continuation, max_length)
        assert score.log_likelihood == pytest.approx(expected, abs=2e-3, rel=2e-5)
        assert score.greedy == greedy


def slow(*values):
    """Cases that repeat others, for `make test-slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", "deepseek_v2", *slow("qwen2", "qwen3", "mixtral", "gpt_oss")]
)
def test_shared_prefixes_change_nothing(architecture):
    """gemma3 and gpt_oss slide their windows, deepseek_v2 caches latents, mixtral and others have experts."""
    check(tiny_model(architecture), pairs())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_that_adds_a_mask_and_attention_that_is_given_one(attention, dtype):
    model = tiny_model("llama").to(dtype)
    model.set_attn_implementation(attention)
    check(model, pairs())


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_the_size_of_batches_changes_nothing(stories, batch_tokens):
    check(stories, pairs(1), batch_tokens=batch_tokens)


@pytest.mark.parametrize(
    "recipe",
    [
        "w4",
        Recipe(name="kv", weights=WeightScheme(format="int8"), kv_cache={"format": "int8"}),
        Recipe(
            name="kv4", weights=WeightScheme(format="int8"), kv_cache={"format": "int4", "granularity": "g4"}
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, *slow(True)])
def test_quantized_models_and_caches_are_read_alike(stories, recipe, packed):
    check(bitassay.quantize(stories, recipe, packed=packed), pairs(2))


def test_a_greedy_continuation_is_known_as_such(stories):
    context = stories.tokenizer("Once upon a time, there was a little").input_ids
    with torch.inference_mode():
        tokens = stories.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0].tolist()
    best = tokens[len(context) :]
    other = [*best[:-1], best[-1] + 1]
    scores = continuation_scores(stories, [(context, best), (context, other)], max_length=512)
    assert [score.greedy for score in scores] == [True, False]


def test_what_is_shared_is_read_once(stories):
    """Tokens that pass the first layer: the trunk, the contexts' rests and the endings, each once."""
    read = 0

    def count(_module, arguments):
        nonlocal read
        read += arguments[0].shape[0] * arguments[0].shape[1]

    trunk = list(range(10, 110))
    contexts = [[*trunk, *range(200 + 40 * place, 240 + 40 * place)] for place in range(4)]
    asked = [(context, [5, 6 + ending]) for context in contexts for ending in range(4)]
    hook = stories.get_decoder().layers[0].register_forward_pre_hook(count)
    try:
        continuation_scores(stories, asked, max_length=512)
    finally:
        hook.remove()
    assert read == 100 + 4 * 39 + 4 * 2  # endings differ only in what is predicted, so a context has one leaf
    assert read < sum(len(context) + 1 for context, _ in asked) / 8


@pytest.mark.parametrize("by_mask", [True, False])
def test_items_that_share_nothing_are_read_together(by_mask, stories, monkeypatch):
    """Contexts of 40 to 45 tokens with all their endings, a row each; without masks, a row for each ending."""
    monkeypatch.setattr(module, "attends_by_mask", lambda model: by_mask)
    shapes = []
    contexts = [list(range(50 * place, 50 * place + 40 + place)) for place in range(6)]
    asked = [(context, [5 + ending, 6, 7]) for context in contexts for ending in range(4)]
    hook = (
        stories.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _module, arguments: shapes.append(tuple(arguments[0].shape[:2])))
    )
    try:
        found = continuation_scores(stories, asked, max_length=512, batch_tokens=512)
    finally:
        hook.remove()
    if by_mask:
        assert shapes == [(6, 45 + 4 * 2)]  # a row ends with four times 2 tokens of an ending
    else:
        assert sum(rows for rows, _ in shapes) == 24
        assert all(rows * length <= 512 for rows, length in shapes)
    for score, (context, continuation) in zip(found, asked, strict=True):
        assert score.log_likelihood == pytest.approx(plain(stories, context, continuation, 512)[0], abs=2e-3)


def test_logits_are_computed_only_where_something_is_scored(stories):
    rows = []
    hook = stories.get_output_embeddings().register_forward_hook(
        lambda _m, _a, out: rows.append(out.shape[:-1].numel())
    )
    try:
        continuation_scores(stories, [([1, 2, 3] * 20, [4, 5]), ([7] * 90, [8])], max_length=512)
    finally:
        hook.remove()
    assert sum(rows) == 3
    assert stories(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3  # the model is left as it was


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=100).map(lambda tail: (1,) * 40 + tuple(tail)), max_size=30)
)
def test_runs_cover_everything_and_share_what_they_say(heads):
    ordered = sorted(heads)
    runs = list(common_prefixes(ordered))
    assert [place for start, stop, _ in runs for place in range(start, stop)] == list(range(len(ordered)))
    for start, stop, shared in runs:
        assert len({head[:shared] for head in ordered[start:stop]}) == 1
        assert all(len(head) >= shared for head in ordered[start:stop])
        assert shared == 0 or shared >= SHARED_TOKENS


def test_a_run_ends_where_little_is_shared():
    one, other = tuple(range(100)), tuple(range(1000, 1100))
    ordered = sorted([(*one, 1), (*one, 2, 3), (*other, 1), (*other, 2), (5000,)])
    assert list(common_prefixes(ordered)) == [(0, 2, 100), (2, 4, 100), (4, 5, 0)]


def test_shared_length():
    assert shared_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_length((1, 2), (1, 2, 4)) == 2
    assert shared_length((), (1,)) == 0


def around(length):
    """Items that begin alike, on either side of a length: their heads end before it, at it, behind it."""
    found = []
    for shared in (length - 24, length - 2, length + 4):
        head = list(range(5, 5 + shared))
        for item in range(3):
            context = [*head, *[200 + item] * (6 * item + 1)]
            found += [(context, [300 + end] * (1 + 4 * end)) for end in range(4)]
    return found


@pytest.mark.parametrize("name", ROTARY)
def test_nothing_is_shared_across_a_change_of_frequencies(name):
    check(tiny_kind(name), around(SHORT))


@pytest.mark.parametrize("name", ["lfm2", *slow(*sorted(set(HYBRID) - {"lfm2"}))])
def test_states_are_shared_where_that_is_right(name):
    check(tiny_kind(name), around(SHORT))


def test_a_state_is_read_once(monkeypatch):
    """Where it may be shared; and nothing is, where it may not."""
    reads, copy_rows = [], module.copy_rows
    monkeypatch.setattr(module, "copy_rows", lambda *arguments: reads.append(1) or copy_rows(*arguments))
    continuation_scores(tiny_kind("lfm2"), around(SHORT), max_length=200)
    assert reads
    reads.clear()
    continuation_scores(tiny_kind("mamba"), around(SHORT), max_length=200)
    assert not reads


@pytest.mark.parametrize("name", [*ROTARY, "lfm2", *slow(*sorted(set(HYBRID) - {"lfm2"}))])
def test_greedy_texts_of_such_models(name):
    model = tiny_kind(name)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    prompts = [context for context, _ in around(SHORT)[::4]]
    texts = greedy_texts(model, model.tokenizer, prompts, stops=[], max_new_tokens=5)
    for prompt, text in zip(prompts, texts, strict=True):
        wanted, _ = reread_greedy(model, prompt, 5)
        assert text == model.tokenizer.decode(wanted, skip_special_tokens=True)

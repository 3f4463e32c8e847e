import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.evaluation import quality
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import evaluate_all, other_tokens, score_windows, summarise
from bitassay.evaluation.statistics import FEWEST
from bitassay.quantization.recipe.recipe import BASE
from bitassay.testing.tiny import tiny_model

SHORT = Protocol(window_tokens=128, windows=6)


@pytest.fixture(autouse=True)
def _short_texts(short_texts, monkeypatch):
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))


def plain_perplexity(model, windows) -> float:
    """The loop that everybody writes, with transformers' own loss."""
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "gemma3", "mistral")),
    ],
)
def test_perplexity_equals_a_plain_transformers_loop(architecture):
    model = tiny_model(architecture)
    windows, _ = token_windows(model.tokenizer, SHORT)
    assert bitassay.evaluate(model, protocol=SHORT).quality.ppl == pytest.approx(
        plain_perplexity(model, windows), rel=1e-5
    )


def test_figures_against_a_base_follow_from_the_tokens(stories):
    quantized = bitassay.quantize(stories, "w3")
    result = bitassay.evaluate(quantized, against=stories, protocol=SHORT)
    windows, _ = token_windows(stories.tokenizer, SHORT)
    base_ppl, ppl = plain_perplexity(stories, windows), plain_perplexity(quantized, windows)
    quality = result.quality
    assert quality.ppl == pytest.approx(ppl, rel=1e-5)
    assert quality.ppl_delta == pytest.approx(ppl - base_ppl, rel=1e-3)
    with torch.inference_mode():
        p = torch.cat([stories(w[None]).logits[0, :-1] for w in windows]).double().log_softmax(1)
        q = torch.cat([quantized(w[None]).logits[0, :-1] for w in windows]).double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1)
    assert quality.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert quality.kl_median == pytest.approx(kl.median().item(), rel=0.05)
    assert quality.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-2)
    assert quality.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert quality.ppl_delta_ci[0] < quality.ppl_delta < quality.ppl_delta_ci[1]
    assert "against stories260k" in str(result)


def test_a_model_against_itself_has_no_cost(stories):
    quality = bitassay.evaluate(stories, against=stories, protocol=SHORT).quality
    assert quality.ppl_delta == 0
    assert quality.ppl_delta_ci == (0, 0)
    assert quality.ppl_delta_visible is None  # there is no spread to see a difference through
    assert quality.kl_mean < 1e-6
    assert quality.top1_agreement == 1


def scores(losses, divergences=0.1, agree=0.9):
    """Of windows of 100 tokens, from their mean losses, KL and agreement."""
    each = np.broadcast_arrays(losses, divergences, agree)
    return [
        TokenScores(torch.full((100,), nll), torch.full((100,), kl), torch.arange(100) < 100 * share)
        for nll, kl, share in zip(*each, strict=True)
    ]


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("more", [-3.0, 0.0, 0.01, 8.0])
def test_intervals_hold_only_what_can_be(windows, more):
    """Whatever the spread: perplexity is at least 1, KL at least 0, a share a share, and a difference above
    what would leave no perplexity."""
    rng = np.random.default_rng(windows)
    base = rng.uniform(3, 6, windows)
    kl, agree = rng.lognormal(-2, 2, windows), rng.uniform(0.8, 1, windows)
    found = summarise(scores(base + more + rng.normal(0, 0.5, windows), kl, agree), scores(base))
    intervals = (found.ppl_ci, found.ppl_delta_ci, found.kl_ci, found.top1_ci)
    if windows < FEWEST:
        assert intervals == (None,) * 4
        return
    assert 1 < found.ppl_ci[0] < found.ppl < found.ppl_ci[1]
    assert 0 < found.kl_ci[0] < found.kl_mean < found.kl_ci[1]
    assert 0 < found.top1_ci[0] < found.top1_agreement < found.top1_ci[1] < 1
    low, high = found.ppl_delta_ci
    base_ppl = found.ppl - found.ppl_delta
    assert low < found.ppl_delta < high
    assert low > -base_ppl if found.ppl_delta >= 0 else high < found.ppl
    assert found.ppl_delta_visible > 0


def test_a_ruined_model_has_figures_and_no_intervals():
    ruined = summarise(scores([800.0, 900.0, 700.0], [5.0, math.inf, 6.0], 0.0), scores([3.0, 4.0, 5.0]))
    assert ruined.ppl == math.inf
    assert ruined.ppl_ci is ruined.ppl_delta_ci is ruined.kl_ci is ruined.top1_ci is None


def test_a_model_of_almost_no_loss_has_a_perplexity_above_one():
    low, high = summarise(scores([0.001, 0.02, 0.004]), scores([0.001, 0.02, 0.004])).ppl_ci
    assert 1 < low < math.exp(0.025 / 3) < high


def test_losses_that_are_not_finite_are_refused_by_name(stories):
    windows, _ = token_windows(stories.tokenizer, SHORT)
    ruined = bitassay.quantize(stories, "w8")
    ruined.get_output_embeddings().weight = torch.nn.Parameter(stories.lm_head.weight * float("inf"))
    with pytest.raises(BitassayError, match=r"w8: the losses of .* are NaN or infinite"):
        next(score_windows(stories, {"w8": ruined}, windows))
    assert next(score_windows(stories, {"w8": ruined}, windows, finite=False))


def test_windows_that_are_done_are_skipped(stories):
    windows, _ = token_windows(stories.tokenizer, SHORT)
    assert [index for index, _ in score_windows(stories, {}, windows, skip={0, 2, 5})] == [1, 3, 4]


def test_many_models_are_read_in_one_pass(stories, monkeypatch):
    models = {name: bitassay.quantize(stories, name) for name in ("w8", "w4")}
    protocol, read = Protocol(windows=3, window_tokens=32), []
    forward = quality.window_logits
    monkeypatch.setattr(quality, "window_logits", lambda model, w: read.append(model) or forward(model, w))
    found = evaluate_all(stories, models, protocol=protocol)
    assert list(found) == [BASE, "w8", "w4"]
    assert [read.count(model) for model in (stories, *models.values())] == [3, 3, 3]
    for name, model in models.items():
        assert found[name] == bitassay.evaluate(model, against=stories, protocol=protocol)
    assert found[BASE] == bitassay.evaluate(stories, protocol=protocol)


def test_models_with_other_vocabularies_are_refused(stories):
    other = tiny_model("llama", vocab_size=600)
    with pytest.raises(BitassayError, match="vocabulary of 600"):
        bitassay.evaluate(other, against=stories, protocol=SHORT)


def test_a_tokenizer_that_gives_other_tokens_is_named(stories):
    other = copy.copy(stories)
    other.tokenizer = lambda text, **_: SimpleNamespace(input_ids=[ord(letter) % 512 for letter in text])
    same = copy.copy(stories)
    same.tokenizer = copy.deepcopy(stories.tokenizer)
    assert other_tokens(stories, {"other": other, "same": same, "self": stories}) == ["other"]


def test_perplexity_is_the_exponential_of_the_mean_loss(stories):
    windows, _ = token_windows(stories.tokenizer, SHORT)
    scores = [found[BASE] for _, found in score_windows(stories, {}, windows)]
    mean = sum(s.nll.double().mean().item() for s in scores) / len(scores)
    assert summarise(scores, scores).ppl == pytest.approx(math.exp(mean))
    assert all(len(s.nll) == 127 for s in scores)


@pytest.mark.slow
@pytest.mark.real
def test_real_perplexity_equals_a_plain_transformers_loop():
    model = bitassay.load("smollm2-135m")
    protocol = Protocol(window_tokens=512, windows=3)
    windows, _ = token_windows(model.tokenizer, protocol)
    assert bitassay.evaluate(model, protocol=protocol).quality.ppl == pytest.approx(
        plain_perplexity(model, windows), rel=1e-4
    )

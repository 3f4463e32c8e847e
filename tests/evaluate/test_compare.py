import math

import pytest
import torch

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.evaluate import compare
from bitassay.evaluate.compare import evaluate_all, score_windows, summarise
from bitassay.quantize.recipe import BASE
from bitassay.testing.tiny import tiny_model

SHORT = Protocol(window_tokens=128, windows=6)


def plain_perplexity(model, windows) -> float:
    """The loop that everybody writes, with transformers' own loss."""
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
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
    assert quality.kl_mean < 1e-6
    assert quality.top1_agreement == 1


def test_windows_that_are_done_are_skipped(stories):
    windows, _ = token_windows(stories.tokenizer, SHORT)
    assert [index for index, _ in score_windows(stories, {}, windows, skip={0, 2, 5})] == [1, 3, 4]


def test_many_models_are_read_in_one_pass(stories, monkeypatch):
    models = {name: bitassay.quantize(stories, name) for name in ("w8", "w4")}
    protocol, read = Protocol(windows=3, window_tokens=32), []
    forward = compare.window_logits
    monkeypatch.setattr(compare, "window_logits", lambda model, w: read.append(model) or forward(model, w))
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


def test_perplexity_is_the_exponential_of_the_mean_loss(stories):
    windows, _ = token_windows(stories.tokenizer, SHORT)
    scores = [found[BASE] for _, found in score_windows(stories, {}, windows)]
    mean = sum(s.nll.double().mean().item() for s in scores) / len(scores)
    assert summarise(scores, scores).ppl == pytest.approx(math.exp(mean))
    assert all(len(s.nll) == 127 for s in scores)


@pytest.mark.real
def test_real_perplexity_equals_a_plain_transformers_loop():
    model = bitassay.load("smollm2-135m")
    protocol = Protocol(window_tokens=512, windows=3)
    windows, _ = token_windows(model.tokenizer, protocol)
    assert bitassay.evaluate(model, protocol=protocol).quality.ppl == pytest.approx(
        plain_perplexity(model, windows), rel=1e-4
    )

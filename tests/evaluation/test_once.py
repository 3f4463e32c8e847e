"""Prompts that are asked twice and read once: the same answers as two readings."""

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from bitassay.evaluation import once
from bitassay.evaluation.harness import BitassayLM
from bitassay.evaluation.likelihood import Prefix
from bitassay.evaluation.once import OnceReadLM, has_plain_cache
from bitassay.testing.tiny import tiny_model

SHARED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with Tom. "
)
CONTEXTS = [
    SHARED + end for end in ("One day, she", "Her mom said that", "Then Tom", "They were happy and they")
] + ["The dog"]
ENDS = (" was", " saw")
GREEDY = {"until": [".", "</s>"]}


def asked_twice(lm):
    """Every context with every end by likelihood, then every context by text."""
    likelihoods = lm.loglikelihood(
        [Instance("loglikelihood", {}, (context, end), 0) for context in CONTEXTS for end in ENDS],
        disable_tqdm=True,
    )
    texts = lm.generate_until(
        [Instance("generate_until", {}, (context, GREEDY), 0) for context in CONTEXTS], disable_tqdm=True
    )
    return likelihoods, texts


def capped(lm, tokens=12):
    lm.max_gen_toks = tokens
    return lm


def test_the_answers_are_those_of_two_readings(stories):
    wanted_scores, wanted_texts = asked_twice(capped(BitassayLM(stories)))
    scores, texts = asked_twice(capped(OnceReadLM(stories)))
    assert texts == wanted_texts
    assert len({len(text) for text in texts}) > 2  # rows end at different steps
    for (mine, greedy), (theirs, wanted) in zip(scores, wanted_scores, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert greedy == wanted


def test_nothing_is_read_again(stories, monkeypatch):
    lm, reads = capped(OnceReadLM(stories)), []
    read = Prefix.extend
    monkeypatch.setattr(Prefix, "extend", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    asked_twice(lm)
    assert len(reads) == 1  # the shared beginning
    assert lm._read == ()


def test_other_prompts_than_were_read_are_read(stories):
    lm = capped(OnceReadLM(stories))
    lm.loglikelihood([Instance("loglikelihood", {}, (CONTEXTS[0], ENDS[0]), 0)], disable_tqdm=True)
    wanted = capped(BitassayLM(stories))
    requests = [Instance("generate_until", {}, (CONTEXTS[1], GREEDY), 0)]
    assert lm.generate_until(requests, disable_tqdm=True) == wanted.generate_until(
        requests, disable_tqdm=True
    )


def test_a_sliding_window_is_left_to_the_plain_model(monkeypatch):
    gemma = tiny_model("gemma3")
    assert not has_plain_cache(gemma)
    monkeypatch.setattr(once, "read_rows", lambda *_: pytest.fail("read once"))
    assert asked_twice(capped(OnceReadLM(gemma), 3))[1] == asked_twice(capped(BitassayLM(gemma), 3))[1]


def test_few_tokens_at_a_time_change_nothing(stories):
    whole, parts = capped(OnceReadLM(stories)), capped(OnceReadLM(stories, batch_tokens=16))
    assert asked_twice(parts)[1] == asked_twice(whole)[1]

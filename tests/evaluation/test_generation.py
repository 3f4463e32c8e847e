"""Texts beside texts: prefixes, BLEU, ROUGE and their intervals."""

import importlib.util

import numpy as np
import pytest

from bitassay.engines.decode import generate
from bitassay.errors import MissingError
from bitassay.evaluation import generation
from bitassay.evaluation.generation import Text, compare_texts, continuations, prefix_lengths

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "far"]


def text(*ids: int) -> Text:
    return Text(ids, " ".join(WORDS[i] for i in ids))


def random_texts(count: int, tokens: int = 20, seed: int = 0) -> list[Text]:
    rng = np.random.default_rng(seed)
    return [text(*rng.integers(0, len(WORDS), tokens).tolist()) for _ in range(count)]


def test_prefixes_end_at_the_first_difference():
    base = [text(1, 2, 3), text(1, 2, 3), text(1, 2, 3), text(1, 2)]
    found = [text(1, 2, 3), text(1, 5, 3), text(4, 2, 3), text(1, 2, 3)]
    assert prefix_lengths(found, base) == [3, 1, 0, 2]


def test_equal_texts():
    base = random_texts(6)
    found = compare_texts(base, base)
    assert (found.prefix_tokens, found.divergence, found.identical_fraction) == (20, 21, 1)
    assert found.bleu == pytest.approx(100)
    assert found.rouge1 == found.rouge2 == found.rougeL == 1
    # Texts that are all equal say nothing of how other texts would differ; a share of them does.
    assert found.bleu_ci is found.rouge1_ci is found.prefix_tokens_ci is None
    assert found.identical_ci == pytest.approx((0.6097, 1), abs=1e-4)


def test_texts_that_part_after_so_many_tokens():
    base, other = random_texts(30), random_texts(30, seed=1)
    found = [
        text(*a.ids[:n], (a.ids[n] + 1) % 8, *b.ids[n + 1 :])
        for n, (a, b) in enumerate(zip(base, other, strict=True))
        if n < 20
    ]
    quality = compare_texts(found, base[:20])
    assert quality.prefix_tokens == np.mean(range(20))
    assert quality.divergence == 10  # the lower median of 1 to 20
    assert quality.identical_fraction == 0
    assert quality.prefix_tokens_ci[0] < 9.5 < quality.prefix_tokens_ci[1]
    assert quality.divergence_ci[0] < 10 < quality.divergence_ci[1]


def test_bleu_is_sacrebleus_of_the_corpus_and_its_interval_holds_it():
    import sacrebleu

    base = random_texts(12)
    found = [
        text(*a.ids[:10], *b.ids[10:]) if i % 3 else a
        for i, (a, b) in enumerate(zip(base, random_texts(12, seed=1), strict=True))
    ]
    quality = compare_texts(found, base)
    expected = sacrebleu.corpus_bleu([one.text for one in found], [[one.text for one in base]])
    assert quality.bleu == pytest.approx(expected.score)
    assert quality.bleu_ci[0] < quality.bleu < quality.bleu_ci[1]
    assert "version:" in quality.bleu_signature
    assert "nrefs:1" in quality.bleu_signature


def test_bleu_without_a_text_is_that_of_the_other_texts():
    import sacrebleu

    base, found = (
        random_texts(5),
        [text(*a.ids[:8], *b.ids[8:]) for a, b in zip(random_texts(5), random_texts(5, seed=1), strict=True)],
    )
    written, reference = ([one.text for one in texts] for texts in (found, base))
    _, without, _ = generation._bleu(written, reference)
    for place, score in enumerate(without):
        others = [written[:place] + written[place + 1 :], reference[:place] + reference[place + 1 :]]
        assert score == pytest.approx(sacrebleu.corpus_bleu(others[0], [others[1]]).score)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 30])
@pytest.mark.parametrize("equal", [0.0, 0.3, 1.0])
def test_intervals_hold_only_what_can_be(count, equal):
    rng = np.random.default_rng(count)
    base, other = random_texts(count), random_texts(count, seed=1)
    found = [a if rng.random() < equal else text(*b.ids[:15]) for a, b in zip(base, other, strict=True)]
    quality = compare_texts(found, base).to_dict()
    for name, most in (
        ("prefix_tokens", 20),
        ("divergence", 21),
        ("bleu", 100),
        ("rouge1", 1),
        ("rougeL", 1),
    ):
        if (interval := quality[f"{name}_ci"]) is not None:
            assert 0 <= interval[0] <= quality[name] <= interval[1] <= most
    low, high = quality["identical_ci"]
    assert 0 <= low <= quality["identical_fraction"] <= high <= 1
    assert low < high


def test_rouge_counts_words_pairs_and_order():
    quality = compare_texts([text(0, 1, 2, 3)], [text(0, 1, 3, 2)])
    assert (quality.rouge1, quality.rouge2, quality.rougeL) == pytest.approx((1, 1 / 3, 3 / 4))
    assert quality.rouge1_ci is None  # one text says nothing of spread


def test_it_asks_for_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(generation, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    with pytest.raises(MissingError, match=r"needs sacrebleu\n.*pip install 'bitassay\[generation\]'"):
        compare_texts([text(1)], [text(1)])


def test_continuations_are_what_generate_gives_batch_by_batch(stories):
    prompts = [
        tuple(stories.tokenizer(words).input_ids) for words in ("Once upon", "The dog", "A cat ran to")
    ]
    kept, said = [], []
    found = continuations(
        stories, prompts, max_new_tokens=6, batch=2, keep=kept.append, progress=lambda *a: said.append(a[1:])
    )
    assert [one.ids for one in found] == [
        one.output_ids
        for batch in (prompts[:2], prompts[2:])
        for one in generate(stories, batch, max_new_tokens=6)
    ]
    assert [len(batch) for batch in kept] == [2, 1]
    assert said == [(0, 3), (2, 3), (3, 3)]
    assert found[0].text == stories.tokenizer.decode(list(found[0].ids), skip_special_tokens=True)
    assert continuations(stories, prompts, max_new_tokens=6, batch=2, done=2) == found[2:]

"""Tasks that another engine answers: the same answers as those of transformers, without reading a text twice."""

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

import bitassay
from bitassay.engines import ENGINES
from bitassay.engines.engine import engine_of
from bitassay.errors import BitassayError
from bitassay.evaluation.harness import BitassayLM
from bitassay.evaluation.hosted import hosted_scores, hosted_texts, longest_text
from engines.hosted import Other, Reader

STORY = "Once upon a time there was a girl named Lily. She liked to play outside in the sun all day. "
CONTEXTS = ["She saw a big", "One day she went to", "  "]
ENDINGS = [" dog", " cat and a ball", " tree.", "they were happy.", " é中"]


@pytest.fixture
def hosted(monkeypatch):
    monkeypatch.setitem(ENGINES._items, "reader", Reader)
    return bitassay.load("stories260k", engine="reader")


def requests(kind, *arguments):
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


def test_answers_are_those_of_transformers(hosted, stories):
    there, here = BitassayLM(hosted), BitassayLM(stories)
    asked = requests(
        "loglikelihood",
        *[(STORY + context, ending) for context in CONTEXTS for ending in ENDINGS],
        ("", " Once upon"),
        (STORY * 25, " The end of it."),  # loses tokens on the left
    )
    for (value, greedy), expected in zip(there.loglikelihood(asked), here.loglikelihood(asked), strict=True):
        assert value == pytest.approx(expected[0], abs=5e-4)
        assert greedy == expected[1]
    rolling = requests("loglikelihood_rolling", (STORY * 25,), ("Hi",))
    assert there.loglikelihood_rolling(rolling) == pytest.approx(
        here.loglikelihood_rolling(rolling), abs=1e-2
    )
    until = {"until": [".", "\n"], "max_gen_toks": 24}
    texts = requests("generate_until", *[(STORY + context, until) for context in CONTEXTS])
    assert there.generate_until(texts) == here.generate_until(texts)


def test_a_text_that_several_endings_need_is_read_once(hosted):
    pairs = [([5, 6, 7], [token]) for token in (8, 9, 10)] + [([5, 6], [7, 8])]
    scores = hosted_scores(hosted, pairs, max_length=512)
    assert engine_of(hosted).read_ids == [(5, 6, 7)]
    for (context, output), score in zip(pairs, scores, strict=True):
        (expected,) = engine_of(hosted).logprobs([context], [output])
        assert score.log_likelihood == pytest.approx(expected.sum().item())
    assert sum(score.greedy for score in scores) <= 2


def test_a_text_ends_at_its_stop_string(hosted, monkeypatch):
    made = []
    continued = Reader.continued

    def noted(self, *arguments):
        made.append(continued(self, *arguments))
        return made[-1]

    monkeypatch.setattr(Reader, "continued", noted)
    prompt = engine_of(hosted).encode(STORY)
    (text,) = hosted_texts(hosted, hosted.tokenizer, [prompt], stops=["."], max_new_tokens=60)
    assert text
    assert "." not in text
    assert len(made[0].output_ids) < 60
    monkeypatch.setattr(hosted.generation_config, "repetition_penalty", 1.2)
    with pytest.raises(BitassayError, match=r"repetition penalty of 1.2, which reader is not given"):
        hosted_texts(hosted, hosted.tokenizer, [prompt], stops=["."], max_new_tokens=60)


def test_an_engine_without_limits_reads_as_much_as_the_model(hosted, monkeypatch):
    monkeypatch.setitem(ENGINES._items, "other", Other)
    assert longest_text(bitassay.load("stories260k", engine="other")) == 512
    monkeypatch.setattr(Reader, "longest_text", 100)
    assert BitassayLM(hosted).max_length == 100

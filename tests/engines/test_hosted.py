"""Models that another engine runs: what is asked of it, and what is refused by name."""

import pytest
import torch

import bitassay
from bitassay.data.windows import Protocol
from bitassay.engines import ENGINES
from bitassay.engines.engine import TRANSFORMERS, engine_name, engine_of
from bitassay.errors import BitassayError
from bitassay.evaluation.generation import continuations
from bitassay.models.identity import identity
from bitassay.verification.calibrate import calibrate
from bitassay.verification.numerics import numerics
from engines.hosted import Other

PROMPT = [1, 403, 407]


@pytest.fixture(autouse=True)
def _other_engine(monkeypatch, short_texts):
    monkeypatch.setitem(ENGINES._items, "other", Other)
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))


@pytest.fixture
def hosted():
    return bitassay.load("stories260k", engine="other")


def test_it_is_the_same_model_without_weights(hosted, stories):
    assert {weight.device.type for weight in hosted.parameters()} == {"meta"}
    assert identity(hosted) == identity(stories)
    assert hosted.generation_config.eos_token_id == stories.generation_config.eos_token_id
    assert engine_of(hosted).encode("Once upon") == engine_of(stories).encode("Once upon")
    assert (engine_name(hosted), engine_name(stories)) == ("other", TRANSFORMERS)
    assert numerics(hosted).engine == "other"


def test_what_is_measured_is_what_the_engine_says(hosted, stories, monkeypatch):
    text = Protocol(window_tokens=64, windows=2)
    own = bitassay.evaluate(hosted, against=stories, protocol=text)
    assert own.model == "stories260k (in other)"
    assert own.quality.kl_mean == pytest.approx(0, abs=1e-6)
    assert own.quality.ppl == pytest.approx(bitassay.evaluate(stories, protocol=text).quality.ppl, rel=1e-5)
    assert continuations(hosted, [PROMPT], max_new_tokens=6) == continuations(
        stories, [PROMPT], max_new_tokens=6
    )

    run = engine_of(hosted).prefill
    shift = torch.linspace(-2, 2, 512)
    monkeypatch.setattr(
        engine_of(hosted),
        "prefill",
        lambda *texts: [type(read)(read.states, read.logits + shift) for read in run(*texts)],
    )
    assert bitassay.evaluate(hosted, against=stories, protocol=text).quality.kl_mean > 0.05


def test_its_traces_are_judged_by_transformers(hosted, stories):
    trace = bitassay.prove(hosted, PROMPT, max_new_tokens=10)
    assert trace.header.numerics.engine == "other"
    verdict = bitassay.verify(trace, stories, expected_prompt=PROMPT, expected_max_new_tokens=10)
    assert verdict.status == "INCONCLUSIVE"  # no profile of this pair
    assert verdict.hidden_distance == pytest.approx(0, abs=1e-5)
    assert not verdict.structural


def test_what_is_not_asked_of_it_is_refused_by_name(hosted, stories):
    with pytest.raises(BitassayError, match="other runs stories260k"):
        hosted(torch.tensor([PROMPT]))
    with pytest.raises(BitassayError, match="another engine has the weights"):
        bitassay.quantize(hosted, recipe="w4")
    with pytest.raises(BitassayError, match="a verifier computes with transformers"):
        bitassay.verify(bitassay.prove(stories, PROMPT, max_new_tokens=2), hosted)
    with pytest.raises(BitassayError, match="a verifier computes with transformers"):
        calibrate(stories, hosted, [PROMPT])
    with pytest.raises(BitassayError, match="suspects change a model of transformers"):
        calibrate(hosted, stories, [PROMPT], suspects=["int8"])


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"packed": True}, {"opened": True}])
def test_what_is_of_transformers_is_refused(options):
    with pytest.raises(BitassayError, match="engine other with"):
        bitassay.load("stories260k", engine="other", **options)


def test_an_unknown_engine_is_refused_before_the_model_is_found():
    with pytest.raises(BitassayError, match=r"engines: no 'llamacpp'; the nearest are 'llama\.cpp'"):
        bitassay.load("no-such-model", engine="llamacpp")

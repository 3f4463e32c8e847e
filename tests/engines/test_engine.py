"""The protocol of engines, and what transformers answers to it."""

import pytest
import torch

from bitassay.engines import ENGINES
from bitassay.engines.decode import generate, prefill
from bitassay.engines.engine import engine_of
from bitassay.errors import BitassayError

PROMPT, OUTPUT = [1, 403, 407], [300, 12, 44]


def test_engines_are_found_by_name(stories):
    assert type(engine_of(stories)) is ENGINES["transformers"]
    with pytest.raises(BitassayError, match="no 'transformer'; the nearest are 'transformers'"):
        ENGINES["transformer"]


def test_an_engine_answers_as_the_functions_do(stories):
    engine = engine_of(stories)
    assert engine.encode(PROMPT) == tuple(PROMPT)
    assert engine.encode("Once upon") == tuple(stories.tokenizer("Once upon").input_ids)
    (made,) = engine.generate([PROMPT], max_new_tokens=5, layers=(2,))
    (wanted,) = generate(stories, [PROMPT], max_new_tokens=5, layers=(2,))
    assert made.output_ids == wanted.output_ids
    assert torch.equal(made.states[2], wanted.states[2])
    (read,) = engine.prefill([PROMPT], [OUTPUT])
    assert torch.equal(read.logits, prefill(stories, [PROMPT], [OUTPUT])[0].logits)
    assert engine.numerics() | {"dtype": "float32", "device": "cpu"} == engine.numerics()


def test_logprobs_are_those_of_transformers(stories):
    (found,) = engine_of(stories).logprobs([PROMPT], [OUTPUT])
    with torch.no_grad():
        logits = stories(torch.tensor([[*PROMPT, *OUTPUT]])).logits[0].double()
    wanted = torch.stack([logits[2 + i].log_softmax(-1)[token] for i, token in enumerate(OUTPUT)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

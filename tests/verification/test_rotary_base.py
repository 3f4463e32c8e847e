"""The direction of another rotary base: seen from the real change, from either side, and from nothing else."""

from dataclasses import replace

import pytest
import torch

from bitassay.engines.rotary import rotary_base_times
from bitassay.testing.architectures import tiny_architecture
from bitassay.verification.detectors.registry import DETECTORS, ROTARY
from bitassay.verification.observe import compare, observe
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request

PROMPTS = [[1, *range(start, start + 40)] for start in range(3, 13)]


def statistics_of(traces, model):
    runs = observe(traces, model, [Request()] * len(traces), (ROTARY,))
    return torch.tensor([run.series[ROTARY][0].values[-1] for run in runs])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_base_to_either_side_is_seen(kind):
    model = tiny_architecture(kind).to(torch.bfloat16)
    honest = statistics_of(prove_many(model, PROMPTS, max_new_tokens=16), model)
    for factor in (1.5, 1 / 1.5):
        with rotary_base_times(model, factor):
            traces = prove_many(model, PROMPTS, max_new_tokens=16)
        assert statistics_of(traces, model).min() > 2 * honest.max()


def test_a_cosine_does_not_depend_on_how_large_the_change_is(honest, model):
    comparison = compare(honest[0], model)
    own, precise, turned = comparison.replayed

    def off(size):
        claimed = {
            layer: own.states[layer] + size * (turned.states[layer] - precise.states[layer])
            for layer in comparison.claimed
        }
        return DETECTORS[ROTARY].measure(replace(comparison, claimed=claimed))[0].values

    first, positions = comparison.n_prompt, len(comparison.positions)
    counts = range(first + 1, positions + 1)
    for size in (100.0, 1000.0, -100.0):  # nothing turns at the first position
        assert off(size) == pytest.approx([(count - 1) / count**0.5 for count in counts], abs=0.01)
    assert set(off(0.0)) == {0.0}


def test_a_model_without_rotary_embeddings_is_not_judged_by_them():
    model = tiny_architecture("gpt2")
    assert set(statistics_of(prove_many(model, PROMPTS[:2], max_new_tokens=4), model).tolist()) == {0.0}

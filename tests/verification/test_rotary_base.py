"""The direction of another rotary base: seen from the real change, from either side, and from nothing else."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from bitassay.engines.rotary import rotary_base_times
from bitassay.testing.architectures import tiny_architecture
from bitassay.verification.detectors.registry import DETECTORS, ROTARY
from bitassay.verification.observe import compare, observe
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request

PROMPTS = [[1, *range(start, start + 40)] for start in range(3, 13)]


def means(traces, model):
    """The signed mean of each run."""
    runs = observe(traces, model, [Request()] * len(traces), (ROTARY,))
    return torch.tensor([fmean(run.series[ROTARY][0].values) for run in runs])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_base_to_either_side_is_seen(kind):
    model = tiny_architecture(kind).to(torch.bfloat16)
    honest = means(prove_many(model, PROMPTS, max_new_tokens=16), model)
    size = honest.std() + 1e-3
    for factor, sign in ((1.5, 1), (1 / 1.5, -1)):
        with rotary_base_times(model, factor):
            traces = prove_many(model, PROMPTS, max_new_tokens=16)
        assert (sign * means(traces, model)).min() > 3 * size


def test_the_statistic_is_the_same_to_either_side():
    detector = DETECTORS[ROTARY]
    assert detector.statistic([0.1, -0.3, 0.05]) == detector.statistic([-0.1, 0.3, -0.05]) > 0


def test_a_cosine_does_not_depend_on_how_large_the_change_is(honest, model):
    comparison = compare(honest[0], model)
    own, precise, turned = comparison.replayed

    def off(size):
        claimed = {
            layer: own.states[layer] + size * (turned.states[layer] - precise.states[layer])
            for layer in comparison.claimed
        }
        return DETECTORS[ROTARY].measure(replace(comparison, claimed=claimed))[0].values

    for size, cosine in ((100.0, 1.0), (1000.0, 1.0), (-100.0, -1.0), (0.0, 0.0)):
        assert off(size) == pytest.approx([cosine] * len(off(size)), abs=0.05)


def test_a_model_without_rotary_embeddings_is_not_judged_by_them():
    model = tiny_architecture("gpt2")
    assert set(means(prove_many(model, PROMPTS[:2], max_new_tokens=4), model).tolist()) == {0.0}

"""Detectors on observations made by hand, where it is known what each must say."""

import math

import numpy as np
import pytest
import torch

from bitassay.verification.detectors.registry import DETECTORS, HonestFit, Statistics
from bitassay.verification.observation import Observation, observe
from bitassay.verification.structure import Request


def observation(shift=0.0, margin=0.0, defects=(), tokens=8, noise=None):
    noise = np.zeros(tokens - 1) if noise is None else noise
    cells = tuple(float(value) - 4 + shift for value in noise)
    return Observation(
        tokens=tokens,
        defects=defects,
        margins=(margin,) * tokens,
        log_distances=(cells, cells),
        prompt_log_distances=(-4.0, -4.0),
        refused_cells={"paper": (0.5,) * (tokens - 1), "documents": (0.0,) * (tokens - 1)},
        projected=cells,
        toploc=dict.fromkeys((1, 2, 4, 8), (1.0 + shift, shift < 1)),
    )


@pytest.fixture
def runs():
    random = np.random.default_rng(0)
    return [
        observation(noise=random.normal(0, 0.1, 7), margin=abs(random.normal(0, 0.01))) for _ in range(40)
    ]


def score(name, runs, one, n=8):
    statistics = DETECTORS[name].statistics
    return HonestFit.of([statistics(other, n) for other in runs]).score(statistics(one, n))


@pytest.mark.parametrize("name", ["distance", "toploc", "activation-difr", "combined"])
def test_states_that_are_far_off(name, runs):
    assert score(name, runs, observation(shift=2.0)) > 10 > score(name, runs, observation())


@pytest.mark.parametrize("name", ["token-difr", "combined"])
def test_tokens_that_lose(name, runs):
    assert score(name, runs, observation(margin=0.5)) > 10 > score(name, runs, observation())


@pytest.mark.parametrize("name", ["distance", "toploc", "activation-difr"])
def test_a_check_of_states_is_blind_to_tokens(name, runs):
    assert score(name, runs, observation(margin=5.0)) == score(name, runs, observation())


def test_a_defect_decides_alone(runs):
    for name in ("structure", "combined"):
        assert score(name, runs, observation(defects=("other-prompt",))) == math.inf
        assert score(name, runs, Observation(8, ("missing-layer",))) == math.inf
    assert score("distance", runs, Observation(8, ("missing-layer",))) == -math.inf


def test_prompt_positions_are_judged_by_the_generated_ones(runs):
    far = observation()
    far = Observation(**{**far.__dict__, "prompt_log_distances": (-4.0, 0.0)})
    assert score("distance", runs, far) > 10


def test_only_the_first_tokens_count(runs):
    late = observation(noise=np.array([0, 0, 0, 0, 3.0, 3.0, 3.0]))
    assert score("distance", runs, late, 4) < 3 < score("distance", runs, late, 8)


def test_a_spread_is_never_too_small():
    same = [Statistics((1.0,), (0.5,), (0,))] * 5
    assert HonestFit.of(same).score(Statistics((2.0,), (0.5,), (0,))) == 2.0


def test_fixed_limits_of_toploc():
    accepts = DETECTORS["toploc"].accepts
    assert accepts(observation(), 8) is True
    assert accepts(observation(shift=2.0), 8) is False
    assert accepts(Observation(8, ("missing-layer",)), 8) is None


def test_observing_real_traces(honest, model):
    honest_traces = honest[:4]
    seen = observe(honest_traces, model, [Request()] * len(honest_traces))
    for one, trace in zip(seen, honest_traces, strict=True):
        assert one.defects == ()
        assert len(one.margins) == one.tokens == trace.n_tokens
        assert [len(layer) for layer in one.log_distances] == [trace.n_tokens - 1] * len(trace.header.layers)
        assert len(one.projected) == trace.n_tokens - 1
        assert max(one.toploc) <= trace.n_tokens
    wrong = observe(honest_traces[:1], model, [Request(nonce="another")])[0]
    assert wrong.defects == ("other-nonce",)
    states = {layer: torch.zeros_like(rows) for layer, rows in honest_traces[0].states.items()}
    zero = observe([type(honest_traces[0])(honest_traces[0].header, states)], model, [Request()])[0]
    assert np.allclose(zero.log_distances, 0)

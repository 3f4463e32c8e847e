"""Detectors on observations made by hand, where it is known what each must say."""

import math

import numpy as np
import pytest
import torch

from bitassay.studies.attacks.evaluation import evaluated, refused_at_published_limits
from bitassay.verification.detectors.detector import Series
from bitassay.verification.fitting import fit
from bitassay.verification.observe import Observation, observe
from bitassay.verification.scores import Statistic, statistics
from bitassay.verification.scores import score as scored
from bitassay.verification.structure import Request


def observation(shift=0.0, margin=0.0, defects=(), tokens=8, noise=None, prompt=-4.0):
    noise = np.zeros(tokens - 1) if noise is None else noise
    cells = tuple(float(value) - 4 + shift for value in noise)
    series = {
        "distance": (Series(cells, (-4.0,)), Series(cells, (prompt,))),
        "excess-distance": (Series(cells, (-4.0,)), Series(cells, (prompt,))),
        "segment-distance": (Series(cells, (-4.0,)), Series(cells, (prompt,))),
        "head-margin": (Series((10 * margin,) * tokens),),
        "rotary-base": (Series((0.0,) * len(cells)),),
        "token-difr": (Series((margin,) * tokens),),
        "token-flips": (Series((float(margin > 0.1),) * tokens),),
        "token-outlier": (Series((10 * margin,) * tokens),),
        "verillm-paper": (Series((0.5,) * (tokens - 1)),),
        "verillm-documents": (Series((0.0,) * (tokens - 1)),),
        "activation-difr": (Series(cells),),
        "toploc": (Series((1.0 + shift,) * tokens, accepted=shift < 1),),
    }
    return Observation(tokens, defects, tokens - 1, (8, 16), series)


@pytest.fixture
def runs():
    random = np.random.default_rng(0)
    return [
        observation(noise=random.normal(0, 0.1, 7), margin=abs(random.normal(0, 0.01))) for _ in range(40)
    ]


def score(name, runs, one, n=8):
    names = evaluated()[name]
    return scored(statistics(one, names, n, n), fit({n: [statistics(run, names, n, n) for run in runs]}), n)


@pytest.mark.parametrize("name", ["distance", "excess-distance", "toploc", "activation-difr", "combined"])
def test_states_that_are_far_off(name, runs):
    assert score(name, runs, observation(shift=2.0)) > 10 > score(name, runs, observation())


@pytest.mark.parametrize(
    ("name", "far"), [("token-difr", 10), ("token-flips", 10), ("token-outlier", 8), ("combined", 10)]
)
def test_tokens_that_lose(name, far, runs):
    assert score(name, runs, observation(margin=0.5)) > far > score(name, runs, observation())


@pytest.mark.parametrize("name", ["distance", "excess-distance", "toploc", "activation-difr"])
def test_a_check_of_states_is_blind_to_tokens(name, runs):
    assert score(name, runs, observation(margin=5.0)) == score(name, runs, observation())


def test_a_defect_decides_alone(runs):
    for name in ("structure", "combined"):
        assert score(name, runs, observation(defects=("other-prompt",))) == math.inf
        assert score(name, runs, Observation(8, ("missing-layer",))) == math.inf
    assert score("distance", runs, Observation(8, ("missing-layer",))) == -math.inf


def test_prompt_positions_are_judged_by_the_generated_ones(runs):
    assert score("distance", runs, observation(prompt=0.0)) > 10


def test_only_the_first_tokens_count(runs):
    late = observation(noise=np.array([0, 0, 0, 0, 3.0, 3.0, 3.0]))
    assert score("distance", runs, late, 4) < 3 < score("distance", runs, late, 8)


def test_a_spread_is_never_too_small():
    same = [[Statistic("token-difr", 0, "generated", 1.0)]] * 5
    assert scored([Statistic("token-difr", 0, "generated", 1.2)], fit({8: same}), 8) == pytest.approx(2)


def test_fixed_limits_of_toploc():
    runs = [observation(), observation(shift=2.0), Observation(8, ("missing-layer",))]
    assert [refused_at_published_limits("toploc", [run]) for run in runs] == [0, 1, None]
    assert refused_at_published_limits("toploc", runs) == 0.5
    assert refused_at_published_limits("distance", runs) is None


def test_observing_real_traces(honest, model):
    honest_traces = honest[:4]
    seen = observe(honest_traces, model, [Request()] * len(honest_traces))
    for one, trace in zip(seen, honest_traces, strict=True):
        assert one.defects == ()
        assert one.tokens == one.positions + 1 == trace.n_tokens
        lengths = {name: [len(series.values) for series in several] for name, several in one.series.items()}
        by_position, by_token = [one.positions], [one.tokens]
        assert lengths == {
            "distance": by_position * len(trace.header.layers),
            "verillm-paper": by_position,
            "verillm-documents": by_position,
            "activation-difr": by_position,
            "proof-2": by_position,
            "proof-8": by_position,
            "toploc": by_token,
            "token-difr": by_token,
            "token-flips": by_token,
            "token-outlier": by_token,
            "head-margin": by_token,
            "segment-distance": by_position * len(trace.header.layers),
            "rotary-base": by_position,
            "excess-distance": by_position * len(trace.header.layers),
            "rounding": by_position * len(trace.header.layers),
            "structure": [],
        }
    wrong = observe(honest_traces[:1], model, [Request(nonce="another")])[0]
    assert wrong.defects == ("other-nonce",)
    states = {layer: torch.zeros_like(rows) for layer, rows in honest_traces[0].states.items()}
    zero = observe([type(honest_traces[0])(honest_traces[0].header, states)], model, [Request()])[0]
    assert np.allclose([series.values for series in zero.series["distance"]], 0)

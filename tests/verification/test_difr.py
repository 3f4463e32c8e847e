"""The projection against its definition and its moments; scores on made-up states and logits."""

import math

import pytest
import torch

from bitassay.engines.decode import Prefill
from bitassay.engines.sampling import Draw, Sampler
from bitassay.errors import BitassayError
from bitassay.verification.detectors.activation_difr import (
    ACTIVATION_DIFR,
    SEED,
    project,
    projection_distances,
    signs,
)
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.distance import CEILING, distance_floor, relative_distances
from bitassay.verification.detectors.token_difr import token_margins, token_statistic
from bitassay.verification.trace import Sampling

SIGNS_8_1_4 = "+--++-++---+--+++--------++---+-"


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_signs_are_these_on_every_machine():
    found = signs(8, 1, 4)
    assert "".join("+" if sign > 0 else "-" for sign in found.flatten()) == SIGNS_8_1_4
    assert set(signs(576, 7).unique().tolist()) == {-1, 1}


def test_other_arguments_give_other_signs():
    base = signs(64, 0, 8)
    assert base.equal(signs(64, 0, 8))
    assert not base.equal(signs(64, 1, 8))
    assert not base[:, :4].equal(signs(64, 0, 4))
    assert not base[:32].equal(signs(32, 0, 8))


def test_signs_are_balanced_and_uncorrelated():
    found = signs(20_000, 3, 8)
    correlations = found.T @ found / len(found)
    assert (correlations - torch.eye(8)).abs().max() < 4.5 / len(found) ** 0.5
    assert found.mean(0).abs().max() < 4.5 / len(found) ** 0.5


def test_the_squared_distance_is_unbiased():
    """E ||P d||^2 = ||d||^2 over seeds, and its standard deviation is at most sqrt(2 / k) ||d||^2."""
    d = normal(1, 48)
    for k in (1, 8):
        estimates = (
            torch.tensor([project(d, seed, k, torch.float64).square().sum().item() for seed in range(2000)])
            / d.square().sum()
        )
        assert estimates.std() <= 1.1 * (2 / k) ** 0.5
        assert estimates.mean() == pytest.approx(1, abs=4 * (2 / k / 2000) ** 0.5)


def test_a_projection_is_linear_and_takes_two_bytes_a_number():
    x, y = normal(3, 32), normal(3, 32, seed=1)
    exact = [project(one, 5, 8, torch.float64) for one in (x, y, x + 2 * y)]
    assert torch.allclose(exact[2], exact[0] + 2 * exact[1])
    assert torch.allclose(exact[0], x @ signs(32, 5, 8) / math.sqrt(8))
    sent = project(x, 5)
    assert sent.shape == (3, 8)
    assert sent.numel() * sent.element_size() == 3 * 16
    assert torch.allclose(sent.double(), exact[0], rtol=2**-11)


def test_what_fp16_cannot_hold_is_an_error():
    huge = torch.full((1, 4), 1e5)
    with pytest.raises(BitassayError, match="too large"):
        project(huge, 0)
    assert project(huge, 0, dtype=torch.bfloat16).isfinite().all()


def test_distances_estimate_those_of_the_full_states():
    y = normal(400, 256)
    x = y + 0.02 * normal(400, 256, seed=1)
    estimated = projection_distances(project(x, 9), y, 9)
    assert estimated.square().mean().sqrt().item() == pytest.approx(
        relative_distances(x, y).square().mean().sqrt().item(), rel=0.05
    )


def test_the_seed_must_be_the_same():
    y = normal(16, 64)
    assert projection_distances(project(y, 1), y, 1).tolist() == [0] * 16
    assert projection_distances(project(y, 1), y, 2).min() > 0.1


def test_what_cannot_be_computed_is_as_far_as_anything():
    y = torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.nan, 1.0], [1.0, 1.0], [1.0, 1.0]])
    claimed = project(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), 0)
    claimed[3, 0], claimed[4, 0] = math.nan, math.inf
    assert projection_distances(claimed, y, 0).tolist() == [CEILING, 0, CEILING, CEILING, CEILING]


def test_the_numbers_of_positions_must_agree():
    y = normal(4, 16)
    with pytest.raises(BitassayError, match="3 projections"):
        projection_distances(project(y, 0)[:3], y, 0)


def comparison(claimed, states, header):
    """One layer, no prompt."""
    update = {"prompt_ids": (), "layers": (1,)}
    prefill = Prefill({1: states}, torch.zeros(len(states) + 1, 4))
    return Comparison(
        header.model_copy(update=update), range(len(states)), {1: claimed}, prefill, states.dtype
    )


def test_the_activation_series_are_logs_with_a_floor(trace):
    y = normal(2, 64).bfloat16()
    (series,) = ACTIVATION_DIFR.measure(comparison(y, y, trace.header))
    assert series.values == pytest.approx([math.log(distance_floor(torch.bfloat16))] * 2)
    x = y.clone()
    x[0] += 1
    (series,) = ACTIVATION_DIFR.measure(comparison(x, y, trace.header))
    assert series.values[0] == pytest.approx(projection_distances(project(x, SEED), y, SEED)[0].log().item())


def test_twice_the_noise_is_told_apart_with_few_tokens():
    y = normal(32, 256)
    means = {
        noise: [
            projection_distances(project(y + noise * normal(32, 256, seed=seed), seed), y, seed).log().mean()
            for seed in range(1, 20)
        ]
        for noise in (0.016, 0.032)
    }
    assert max(means[0.016]) < min(means[0.032])


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 0.95, 3)])
def test_token_margins_are_those_of_the_sampler(sampler, trace):
    logits = normal(24, 100).float() * 3
    draws = [Draw("nonce", index) for index in range(24)]
    tokens = sampler.choose(logits, draws)
    sampling = Sampling.of(sampler, 24)
    for claimed, lowest in ((tokens, 0.0), ((tokens + 1) % 100, 0.5)):
        update = {"output_ids": tuple(claimed.tolist()), "nonce": "nonce", "sampling": sampling}
        header = trace.header.model_copy(update=update)
        found = token_margins(Comparison(header, (), {}, Prefill({}, logits), torch.float32))
        assert found == tuple(sampler.margins(logits, claimed, draws).tolist())
        assert (sum(found) / 24 > lowest) == bool(lowest)
    assert token_statistic([0.0, 0.1]) == pytest.approx(math.log(0.1))

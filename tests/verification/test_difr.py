"""The projection against its definition and its moments; scores on made-up states and logits."""

import math

import pytest
import torch

from bitassay.engines.sampling import MARGIN_CAP, Draw, Sampler
from bitassay.errors import BitassayError
from bitassay.verification.detectors.difr import (
    activation_score,
    project,
    projection_distances,
    signs,
    token_score,
)
from bitassay.verification.distance import CEILING, distance_floor, relative_distances

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


def test_activation_score_is_the_mean_log_with_a_floor():
    y = normal(2, 64).bfloat16()
    floor = math.log(distance_floor(torch.bfloat16))
    assert activation_score(project(y, 0), y, 0) == pytest.approx(floor)
    claimed = project(y, 0)
    claimed[0] += 1
    one = projection_distances(claimed, y, 0)[0].item()
    assert activation_score(claimed, y, 0) == pytest.approx((math.log(one) + floor) / 2)


def test_activation_score_separates_twice_the_noise_with_few_tokens():
    y = normal(32, 256)
    scores = {
        noise: [
            activation_score(project(y + noise * normal(32, 256, seed=seed), seed), y, seed)
            for seed in range(1, 20)
        ]
        for noise in (0.016, 0.032)
    }
    assert max(scores[0.016]) < min(scores[0.032])


def test_token_score_caps_each_margin():
    assert token_score(torch.tensor([0.0, 1.0, 1000.0])) == pytest.approx((1 + MARGIN_CAP) / 3)
    assert token_score(torch.tensor([0.0, 1.0, 1000.0]), cap=2) == 1
    assert math.isnan(token_score(torch.zeros(0)))


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 0.95, 3)])
def test_token_score_of_the_samplers_margins(sampler):
    logits = normal(24, 100).float() * 3
    draws = [Draw("nonce", index) for index in range(24)]
    tokens = sampler.choose(logits, draws)
    assert token_score(sampler.margins(logits, tokens, draws)) == 0
    others = (tokens + 1) % 100
    assert token_score(sampler.margins(logits, others, draws)) > 0.5

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitassay.engines.sampling import (
    GREEDY,
    MARGIN_CAP,
    Draw,
    NonceSampler,
    Sampler,
    gumbel_noise,
    nucleus,
    seed_of,
)
from bitassay.errors import BitassayError


def test_noise_is_a_pure_function_of_seed_nonce_and_index():
    noise = gumbel_noise(1, Draw("a", 2), 100)
    assert np.array_equal(noise, gumbel_noise(1, Draw("a", 2), 100))
    for other in (
        gumbel_noise(2, Draw("a", 2), 100),
        gumbel_noise(1, Draw("b", 2), 100),
        gumbel_noise(1, Draw("a", 3), 100),
    ):
        assert not np.isclose(noise, other).any()


def test_noise_is_pinned_because_traces_outlive_versions():
    assert gumbel_noise(7, Draw("nonce", 3), 3) == pytest.approx(
        [0.922269813451985, 0.705788970388389, 0.258874935825694], abs=1e-12
    )


def test_a_seed_follows_from_the_nonce_and_is_pinned():
    assert (seed_of("n1-0"), seed_of("")) == (4082718753592902993, 8645747905716166070)
    seeds = [seed_of(f"n{index}") for index in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_sampler_by_nonce_chooses_as_one_with_each_requests_seed():
    logits, by_nonce = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), NonceSampler(1.0, 0.9)
    draws = [Draw(f"n{index}", 3) for index in range(6)]
    chosen = by_nonce.choose(logits, draws)
    for row, draw in enumerate(draws):
        own = by_nonce.of_request(draw.nonce)
        assert own == Sampler(1.0, 0.9, seed_of(draw.nonce))
        assert own.choose(logits[row : row + 1], [draw]) == chosen[row]
    assert not by_nonce.margins(logits, chosen, draws).any()
    assert by_nonce != Sampler(1.0, 0.9)
    assert Sampler(1.0, 0.9, 5).of_request("x") == Sampler(1.0, 0.9, 5)


def test_noise_is_gumbel_distributed():
    noise = gumbel_noise(0, Draw("", 0), 200_000)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_gumbel_max_draws_from_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    sampler = Sampler(temperature=1.5)
    draws = [Draw("x", index) for index in range(4000)]
    chosen = sampler.choose(logits.expand(4000, 4), draws)
    expected = (logits[0].double() / 1.5).softmax(0)
    assert torch.allclose(chosen.bincount(minlength=4) / 4000, expected.float(), atol=0.03)


def test_top_p_never_leaves_the_nucleus():
    logits = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)) * 3
    chosen = Sampler(1.0, 0.6).choose(logits, [Draw("x", index) for index in range(500)])
    assert nucleus(logits.double(), 0.6).gather(1, chosen[:, None]).all()
    assert len(chosen.unique()) > 5


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.05, 1))
def test_nucleus_is_the_smallest_set_that_reaches_p(values, top_p):
    kept = nucleus(torch.tensor([values], dtype=torch.float64), top_p)[0]
    probabilities = torch.tensor(values, dtype=torch.float64).softmax(0)
    ordered, total, count = sorted(probabilities.tolist(), reverse=True), 0.0, 0
    while total < top_p - 1e-12 and count < len(values):
        total += ordered[count]
        count += 1
    wanted = len(values) if top_p == 1 else int((probabilities >= ordered[count - 1]).sum())
    assert int(kept.sum()) == wanted or abs(total - top_p) < 1e-9
    assert probabilities[kept].min() > probabilities[~kept].max() if (~kept).any() else True


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_the_nucleus_of_a_large_vocabulary(temperature):
    """Found among few tokens, or, where probability is spread, among all: the same as by sorting all."""
    logits = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = logits / temperature
    ordered, order = scaled.softmax(-1).sort(-1, descending=True)
    inside = ordered.cumsum(-1) - ordered < 0.9
    assert (inside.sum() < 6 * 1024) == (temperature < 1)
    assert torch.equal(nucleus(scaled, 0.9), torch.zeros_like(inside).scatter(1, order, inside))


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(0.8, 1.0, 3), Sampler(1.2, 0.7, 4)])
def test_the_chosen_token_has_margin_zero_and_others_do_not(sampler):
    logits = torch.randn(
        70, 50, generator=torch.Generator().manual_seed(1)
    )  # more rows than are worked on at a time
    draws = [Draw("n", index) for index in range(70)]
    chosen = sampler.choose(logits, draws)
    assert sampler.margins(logits, chosen, draws).eq(0).all()
    assert sampler.margins(logits, (chosen + 1) % 50, draws).gt(0).all()


def test_greedy_margin_is_the_gap_to_the_largest_logit():
    margins = GREEDY.margins(torch.tensor([[0.0, 3.0, 1.0]] * 3), torch.tensor([0, 1, 2]), [Draw("", 0)] * 3)
    assert margins.tolist() == [3, 0, 2]


def test_wrong_seed_nonce_temperature_and_top_p_show():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(2))
    draws = [Draw("n", index) for index in range(200)]
    chosen = Sampler(1.0, 0.9, 5).choose(logits, draws)
    for wrong in (Sampler(1.0, 0.9, 6), Sampler(0.5, 0.9, 5), Sampler(1.0, 0.3, 5), GREEDY):
        assert wrong.margins(logits, chosen, draws).mean() > 0.05
    assert Sampler(1.0, 0.9, 5).margins(logits, chosen, [Draw("m", d.index) for d in draws]).mean() > 0.05


def test_a_token_outside_the_nucleus_pays_for_the_gap_even_where_the_noise_likes_it():
    logits = torch.tensor([[5.0, 0.0]])
    index = next(i for i in range(10_000) if np.diff(gumbel_noise(0, Draw("", i), 2))[0] > 6)
    assert Sampler(1.0, 1.0).margins(logits, torch.tensor([1]), [Draw("", index)]).item() == 0
    assert Sampler(1.0, 0.9).margins(logits, torch.tensor([1]), [Draw("", index)]).item() == pytest.approx(5)


def test_one_margin_is_capped():
    assert GREEDY.margins(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), [Draw("", 0)]).item() == MARGIN_CAP


def test_logits_that_are_not_finite_give_the_largest_margin():
    logits = torch.tensor([[torch.nan, 1.0], [torch.inf, torch.inf]])
    assert GREEDY.margins(logits, torch.tensor([1, 1]), [Draw("", 0)] * 2).tolist() == [MARGIN_CAP] * 2


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_impossible_samplers_are_refused(wrong):
    with pytest.raises(BitassayError, match=next(iter(wrong))):
        Sampler(**wrong)

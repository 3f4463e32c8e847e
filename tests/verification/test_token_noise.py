"""Flips and outliers on logits whose rounding noise is known."""

import math

import pytest
import torch

from bitassay.engines.decode import Prefill
from bitassay.engines.sampling import Draw, Sampler
from bitassay.verification.detectors.detector import Comparison, Series
from bitassay.verification.detectors.token_noise import (
    MOST_UNITS,
    TOKEN_FLIPS,
    TOKEN_OUTLIER,
    check_flips,
    check_outlier,
    excess_flips,
    margins_and_noise,
)
from bitassay.verification.trace import Sampling

VOCABULARY, TOKENS, NOISE = 64, 24, 0.1
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(0.8, 1.0, 3), "top-p": Sampler(1.0, 0.9, 3)}


@pytest.fixture(scope="module")
def header(honest):
    return honest[0].header


def run(header, generator, sampler=SAMPLERS["greedy"], noise=NOISE, claimed=None, dtype=torch.bfloat16):
    """An honest run of TOKENS tokens: both sides have exact logits and their own normal noise."""
    exact = 2 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    own, host = (
        exact + noise * torch.randn(TOKENS, VOCABULARY, generator=generator) for _ in ("own", "host")
    )
    draws = [Draw(header.nonce, index) for index in range(TOKENS)]
    output = sampler.choose(host.double(), draws) if claimed is None else claimed(exact)
    changed = header.model_copy(
        update={"output_ids": tuple(output.tolist()), "sampling": Sampling.of(sampler, TOKENS)}
    )
    return Comparison(changed, (), {}, Prefill({}, own), dtype, Prefill({}, exact))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "top-p"])
def test_as_many_near_ties_are_lost_as_predicted(header, sampler):
    """Over 200 honest runs; the statistic that sums them up is 0 on average."""
    generator, found, statistics = torch.Generator().manual_seed(0), [], []
    for number in range(200):
        named = header.model_copy(update={"nonce": f"run-{number}"})
        comparison = run(named, generator, SAMPLERS[sampler])
        _, flipped, p = margins_and_noise(comparison)
        found.append(torch.stack([flipped, p]))
        statistics.append(TOKEN_FLIPS.statistic(check_flips(comparison, None)[0].values))
    flipped, p = torch.cat(found, 1)
    assert p.sum() > 80, "there are near ties"
    assert abs(flipped.sum() - p.sum()) < 3 * (p * (1 - p)).sum().sqrt()
    mean = sum(statistics) / len(statistics)
    spread = (sum((value - mean) ** 2 for value in statistics) / (len(statistics) - 1)) ** 0.5
    assert abs(mean) < 3 * spread / len(statistics) ** 0.5
    assert 0.5 < spread < 1.3


def test_the_rim_of_the_nucleus_adds_flips_that_are_not_predicted(header):
    """A token that rounding moves in or out of the nucleus; what verdicts do about it is to calibrate."""
    generator, flips, predicted = torch.Generator().manual_seed(0), 0.0, 0.0
    for number in range(200):
        named = header.model_copy(update={"nonce": f"run-{number}"})
        _, flipped, p = margins_and_noise(run(named, generator, SAMPLERS["top-p"]))
        flips, predicted = flips + float(flipped.sum()), predicted + float(p.sum())
    assert 1 < flips / predicted < 1.4


def test_noise_that_is_twice_the_verifiers_own_gives_more_flips_than_predicted(header):
    """What the other tests cannot show: the prediction is not of any number of flips."""
    generator, flips, predicted = torch.Generator().manual_seed(1), 0.0, 0.0
    for _ in range(100):
        honest = run(header, generator)
        host = honest.reference.logits + 4 * NOISE * torch.randn(TOKENS, VOCABULARY, generator=generator)
        changed = honest.header.model_copy(update={"output_ids": tuple(host.argmax(-1).tolist())})
        _, flipped, p = margins_and_noise(
            Comparison(changed, (), {}, honest.verifier, honest.dtype, honest.precise)
        )
        flips, predicted = flips + flipped.sum().item(), predicted + p.sum().item()
    assert flips > predicted + 5 * predicted**0.5


def test_p_is_that_of_a_single_near_tie(header):
    """Two tokens, one noise sd apart, and the others far below."""
    exact = torch.full((TOKENS, VOCABULARY), -50.0)
    exact[:, 3], exact[:, 4] = 0.0, -NOISE
    noise = NOISE * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    claimed = (3,) * (TOKENS - 1) + (4,)
    changed = header.model_copy(update={"output_ids": claimed, "sampling": Sampling.of(Sampler(), TOKENS)})
    _, flipped, p = margins_and_noise(
        Comparison(changed, (), {}, Prefill({}, exact + noise), torch.bfloat16, Prefill({}, exact))
    )
    assert flipped.tolist() == [0.0] * (TOKENS - 1) + [1.0]
    assert p.mean().item() == pytest.approx(0.5 * math.erfc(1 / 2), abs=0.02)


def test_one_implausible_token_is_seen(header):
    """The third best once among 24 tokens: nothing for a mean of margins, and what no rounding explains."""
    honest, one = (
        run(header, torch.Generator().manual_seed(4), claimed=claimed)
        for claimed in (lambda exact: exact.argmax(-1), third_best_once)
    )
    seen = [TOKEN_OUTLIER.statistic(check_outlier(each, None)[0].values) for each in (honest, one)]
    assert seen[0] == 0
    assert seen[1] > math.log1p(6)
    values = check_outlier(one, None)[0].values
    assert [index for index, value in enumerate(values) if value > 3] == [5]
    assert max(values) <= MOST_UNITS


def third_best_once(exact):
    claimed = exact.argmax(-1)
    claimed[5] = exact[5].topk(3).indices[2]
    return claimed


def test_a_margin_is_in_units_of_the_noise(header):
    generator = torch.Generator().manual_seed(5)
    large, small = (
        run(header, generator.manual_seed(5), noise=noise, claimed=third_best_once) for noise in (0.2, 0.1)
    )
    units = [check_outlier(each, None)[0].values[5] for each in (large, small)]
    assert units[1] == pytest.approx(2 * units[0], rel=0.01)


def test_excess_flips_by_hand():
    """Two tokens with chances of 0.2 and 0.5 to lose, of which the second does; the others cannot."""
    values = [-0.2, 0.5, 0.0, 0.0]
    assert excess_flips(values) == pytest.approx(0.3 / (0.16 + 0.25 + 0.05) ** 0.5)
    assert excess_flips([1.0]) == pytest.approx(1 / 0.05**0.5), "a flip where none was to be expected"
    assert excess_flips([0.0] * 9) == 0


def test_logits_that_are_not_finite_are_no_statistic_that_is_not_finite(header):
    for where in ("verifier", "precise"):
        one = run(header, torch.Generator().manual_seed(6))
        getattr(one, where).logits[3] = math.nan
        for check, detector in ((check_flips, TOKEN_FLIPS), (check_outlier, TOKEN_OUTLIER)):
            (series,) = check(one, None)
            assert isinstance(series, Series)
            assert math.isfinite(detector.statistic(series.values))

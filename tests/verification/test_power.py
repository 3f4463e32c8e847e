"""Ranks against brute force, thresholds that flip decisions, intervals that cover."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.power import auc, tokens_to, tpr_at_fpr
from bitassay.verification.scores import threshold

few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@settings(max_examples=100, deadline=None)
@given(few, few)
def test_auc_is_the_share_of_pairs(honest, attacked):
    pairs = [(a > h) + 0.5 * (a == h) for a in attacked for h in honest]
    found = auc(honest, attacked)
    assert found.value == pytest.approx(np.mean(pairs))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert auc(attacked, honest).value == pytest.approx(1 - found.value)


@settings(max_examples=100, deadline=None)
@given(few, st.integers(0, 7).map(float), st.sampled_from([0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5]))
def test_the_threshold_refuses_exactly_where_the_conformal_p_value_does(honest, score, fpr):
    p_value = (1 + (honest >= score).sum()) / (len(honest) + 1)
    assert (score > threshold(honest, fpr)) == (p_value <= fpr + 1e-12)


def test_the_threshold_is_a_score_of_this_rank():
    honest = np.random.default_rng(0).permutation(np.arange(1.0, 100))  # 1 .. 99
    assert threshold(honest, 0.01) == 99
    assert threshold(honest, 0.02) == 98
    assert threshold(honest, 0.05) == 95
    assert threshold(honest[:98], 0.01) == math.inf
    assert threshold(np.arange(1.0, 10), 0.7) == 3, "10 * (1 - 0.7) is 3 and a little in floating point"
    assert threshold(np.arange(5.0), 1 - 1e-12) == 0


def test_one_honest_score_flips_a_decision():
    honest = np.arange(99.0)
    attacked = np.array([98.5])
    assert tpr_at_fpr(honest, attacked).value == 1
    assert tpr_at_fpr(np.append(honest[:-1], 99.0), attacked).value == 0
    assert tpr_at_fpr(honest, np.array([98.0])).value == 0, "as bad as the worst honest one is not refused"
    assert tpr_at_fpr(honest, np.array([97.5]), fpr=0.02).value == 1
    assert tpr_at_fpr(honest[:98], np.array([1e9])).value == 0, "98 honest scores know no 1 %"


def test_the_false_positive_rate_is_at_most_what_was_asked_for():
    rng = np.random.default_rng(1)
    for n in (19, 50, 99):
        rates = [tpr_at_fpr(rng.normal(size=n), rng.normal(size=200), 0.05).value for _ in range(400)]
        assert np.mean(rates) <= 0.05 + 3 * np.std(rates) / 20


def test_the_interval_of_the_rate_is_clopper_pearsons():
    honest, attacked = np.arange(99.0), np.array([1e3] * 9 + [0.0])
    found = tpr_at_fpr(honest, attacked)
    assert found == (0.9, pytest.approx(0.5550, abs=1e-4), pytest.approx(0.9975, abs=1e-4))
    assert tpr_at_fpr(honest, attacked[:9]).low == pytest.approx(0.025 ** (1 / 9))
    assert tpr_at_fpr(honest, attacked, level=0.5).low > found.low


def test_the_interval_of_the_auc_covers_and_does_not_shrink_to_a_point():
    perfect = auc(np.arange(20.0), np.arange(30.0, 60.0))
    assert perfect.value == perfect.high == 1
    assert perfect.low == pytest.approx(20 / (20 + 1.959964**2))
    rng = np.random.default_rng(2)
    for shift, true in ((0.0, 0.5), (1.0, 0.76025), (2.5, 0.96145)):
        found = [auc(rng.normal(size=25), shift + rng.normal(size=40)) for _ in range(400)]
        assert np.mean([one.low <= true <= one.high for one in found]) >= 0.94


@pytest.mark.parametrize("act", [auc, tpr_at_fpr])
def test_nothing_and_nan_are_errors(act):
    good = np.arange(5.0)
    with pytest.raises(BitassayError, match="no attacked"):
        act(good, good[:0])
    with pytest.raises(BitassayError, match="no honest"):
        act(good[:0], good)
    with pytest.raises(BitassayError, match="1 of 2 attacked"):
        act(good, np.array([1.0, math.nan]))


@pytest.mark.parametrize("fpr", [0.0, 1.0, math.nan])
def test_a_false_positive_rate_must_be_one(fpr):
    with pytest.raises(BitassayError, match="not between"):
        threshold(np.arange(5.0), fpr)


def test_tokens_to_is_where_the_rate_stays():
    rates = {8: 0.5, 16: 1.0, 32: 0.98, 64: 0.99, 128: 1.0}
    assert tokens_to(rates) == 64, "16 tokens were enough by luck: 32 are not"
    assert tokens_to(dict(reversed(rates.items()))) == 64
    assert tokens_to(rates, target=0.98) == 16
    assert tokens_to(rates, target=0.5) == 8
    assert tokens_to(rates, target=1) == 128
    assert tokens_to(rates | {256: 0.9}) is None
    assert tokens_to({}) is None

"""Fair odds by enumeration of all orders, false accusations and power by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.sequential import (
    DELTAS,
    alarm_at,
    anytime_p_value,
    log_ratios,
    log_wealth,
    looks,
    rate_wealth,
    start_weights,
    starts,
)


def orders(n, k):
    """Log wealth after each request, for every order of n honest scores and k requests."""
    return {
        order: log_wealth(np.array(order[n:], dtype=float), np.array(order[:n], dtype=float))
        for order in itertools.permutations(range(n + k))
    }


def ranks_among(order, count):
    """What is known of an order after `count` scores: how they compare with each other."""
    return tuple(np.argsort(np.argsort(order[:count])).tolist())


@pytest.mark.parametrize(("n", "k"), [(1, 5), (3, 3), (5, 1)])
def test_the_odds_are_fair_at_every_step(n, k):
    """Given the order so far, the capital after the next request is on average what it is now."""
    wealth = orders(n, k)
    assert np.mean([np.exp(one[0]) for one in wealth.values()]) == pytest.approx(1)
    for step in range(1, k):
        after = {}
        for order, one in wealth.items():
            after.setdefault(ranks_among(order, n + step), []).append(np.exp(one[step - 1 : step + 1]))
        for pairs in after.values():
            now, then = np.mean(pairs, axis=0)
            assert then == pytest.approx(now)


def test_the_ratio_is_that_of_the_order_under_the_alternative():
    """P(order) by the definition of a race: the smallest is taken with chances proportional to the weights,
    which is how scores with P(s > x) = P(honest > x)^delta are ordered."""
    requests = np.array([False, True, True, False, True])
    expected = []
    for delta in DELTAS:
        weights = np.where(requests, delta, 1.0)
        chance = math.prod(weights[i] / weights[i:].sum() for i in range(5))
        expected.append(chance * math.factorial(5))
    assert log_ratios(requests[None]).tolist() == [pytest.approx(math.log(np.mean(expected)))]


def test_a_perfect_separation_gives_nearly_all_that_ranks_can():
    honest, requests = np.arange(50.0), 100 + np.arange(3.0)
    limit = [math.log(math.comb(50 + k, k)) for k in (1, 2, 3)]
    found = log_wealth(requests, honest)
    assert (found < limit).all()
    assert (found > np.array(limit) - math.log(2) - math.log(len(DELTAS)) - 0.1).all()
    assert alarm_at(found) == 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_ties_count_against_the_alarm(honest, requests, lot):
    def by_lot(values):
        return np.array([value + lot.random() / 2 for value in values])

    tied = log_wealth(np.array(requests, dtype=float), np.array(honest, dtype=float))
    assert (tied <= log_wealth(by_lot(requests), by_lot(honest)) + 1e-9).all()


def test_only_the_order_counts_and_what_comes_later_changes_nothing():
    rng = np.random.default_rng(0)
    honest, requests = rng.normal(size=20), rng.normal(size=30)
    found = log_wealth(requests, honest)
    assert log_wealth(np.exp(requests), np.exp(honest)) == pytest.approx(found)
    assert log_wealth(requests, rng.permutation(honest)) == pytest.approx(found)
    for k in (0, 1, 17):
        assert log_wealth(requests[:k], honest) == pytest.approx(found[:k])


def test_infinite_scores_are_the_largest():
    honest = np.arange(20.0)
    assert log_wealth(np.array([math.inf]), honest) == pytest.approx(log_wealth(np.array([99.0]), honest))


def test_starts_grow_sparser_and_never_move():
    assert starts(0).tolist() == []
    assert starts(12).tolist() == list(range(12))
    assert starts(40).tolist() == [*range(16), *range(16, 32, 2), 32, 36]
    assert starts(1000)[: len(starts(300))].tolist() == starts(300).tolist()
    assert np.diff(starts(5000) / 8).max() <= 5000 / 64


def test_all_shares_of_the_capital_sum_to_one():
    assert start_weights(0).tolist() == []
    assert start_weights(1).tolist() == [0.5]
    assert start_weights(3).tolist() == [0.5, 0.25, pytest.approx(1 / 12)]
    assert start_weights(10**5).sum() == pytest.approx(1, abs=1e-5)
    assert start_weights(10**5).sum() < 1


@pytest.mark.parametrize("n", [5, 20])
def test_an_honest_host_is_rarely_ever_accused(n):
    """Over all looks, with few calibration scores, from a skewed distribution with ties."""
    rng, alpha, hosts = np.random.default_rng(n), 0.2, 150
    accused = 0
    for _ in range(hosts):
        drawn = np.round(rng.exponential(size=n + 50), 1)
        accused += alarm_at(log_wealth(drawn[n:], drawn[:n]), alpha) is not None
    assert accused / hosts <= alpha
    assert accused > 0, "a test that never alarms shows nothing"


def test_products_of_conformal_e_values_do_accuse_honest_hosts():
    """Why ranks in one growing pool: p-values of one profile depend on its luck, and bets on them as if they
    were independent break the bound."""
    rng, alpha, hosts, n, k = np.random.default_rng(0), 0.05, 200, 10, 1000
    drawn = rng.normal(size=(hosts, n + k))
    above = (drawn[:, None, :n] >= drawn[:, n:, None]).sum(-1)
    e_values = np.arange(1, n + 2) ** -0.2
    e_values /= e_values.mean()  # p^(kappa - 1), kappa = 0.8: worth 1 on average over the n + 1 p-values
    wealth = np.cumsum(np.log(e_values)[above], axis=1)
    assert (wealth.max(1) >= -math.log(alpha)).mean() > 3 * alpha
    ours = [alarm_at(log_wealth(one[n : n + 40], one[:n]), alpha) for one in drawn[:100]]
    assert np.mean([alarm is not None for alarm in ours]) <= alpha


DOCUMENTED = {
    (50, 1): 23,
    (100, 1): 19,
    (20, 2): 6,
    (50, 2): 5,
    (100, 2): 4,
    (20, 3): 3,
    (50, 3): 2,
    (100, 3): 2,
}


@pytest.mark.parametrize(("n", "shift"), DOCUMENTED)
def test_power_is_as_documented(n, shift):
    rng, documented = np.random.default_rng(n), DOCUMENTED[n, shift]
    looks = 2 * documented + 10
    alarms = [
        alarm_at(log_wealth(shift + rng.normal(size=looks), rng.normal(size=n))) or math.inf
        for _ in range(40)
    ]
    assert np.median(alarms) == pytest.approx(documented, rel=0.4, abs=1)


def test_a_host_that_begins_to_cheat_late_is_caught_soon():
    rng = np.random.default_rng(4)
    alarms = []
    for _ in range(20):
        scores = rng.normal(size=90)
        scores[75:] += 4
        alarms.append(alarm_at(log_wealth(scores, rng.normal(size=30))))
    late = [alarm - 75 for alarm in alarms if alarm is not None]
    assert len(late) == 20
    assert min(late) > 0
    assert np.median(late) <= 8


def test_alpha_flips_the_alarm():
    wealth = np.log([2.0, 10.1, 100.1, 50.0])
    assert alarm_at(wealth, 0.1) == 2
    assert alarm_at(wealth, 0.01) == 3
    assert alarm_at(wealth, 0.009) is None
    assert alarm_at(wealth[:0]) is None
    assert anytime_p_value(wealth) == pytest.approx(1 / 100.1)
    assert anytime_p_value(np.log([0.5, 0.1])) == anytime_p_value(wealth[:0]) == 1
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(BitassayError, match="not between"):
            alarm_at(wealth, bad)


def test_fewer_looks_see_the_same_capital():
    rng = np.random.default_rng(0)
    honest, requests = rng.normal(size=70), rng.normal(size=90)
    some = np.array([1, 7, 64, 90])
    assert log_wealth(requests, honest, some) == pytest.approx(log_wealth(requests, honest)[some - 1])
    assert looks(5).tolist() == [1, 2, 3, 4, 5]
    assert looks(600)[:300].tolist() == [*range(1, 257), *range(258, 346, 2)]


# --- how often something happens


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_bets_on_a_rate_are_fair_at_that_rate_and_lose_below(rate):
    """Over all courses of six chances, by their probability at the rate: on average what it was before."""
    courses = [np.array(one) for one in itertools.product([False, True], repeat=6)]
    wealth = {tuple(one): np.exp(rate_wealth(one, rate)) for one in courses}
    for course in courses:
        for step in range(5):
            now = wealth[tuple(course)][step]
            then = [
                wealth[(*course[: step + 1], happens, *course[step + 2 :])][step + 1]
                for happens in (True, False)
            ]
            assert rate * then[0] + (1 - rate) * then[1] == pytest.approx(now)
            assert then[0] > then[1]
    first = [wealth[(happens, *[False] * 5)][0] for happens in (True, False)]
    assert rate * first[0] + (1 - rate) * first[1] == pytest.approx(1)


def test_a_host_at_the_rate_is_rarely_ever_accused_and_one_above_it_soon():
    rng, rate, alpha = np.random.default_rng(0), 0.1, 0.05
    honest = [alarm_at(rate_wealth(rng.random(400) < rate, rate), alpha) for _ in range(400)]
    accused = np.mean([alarm is not None for alarm in honest])
    assert 0 < accused <= alpha
    often = [alarm_at(rate_wealth(rng.random(60) < 0.5, rate), 0.01) for _ in range(50)]
    assert None not in often
    late = np.append(np.zeros(100, bool), np.ones(12, bool))
    assert 100 < alarm_at(rate_wealth(late, rate), 0.01) <= 112


def test_rates_are_between_0_and_1():
    assert rate_wealth(np.zeros(0, bool), 0.1).tolist() == []
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(BitassayError, match="not between"):
            rate_wealth(np.ones(2, bool), rate)


def test_nan_and_no_honest_scores_are_errors():
    good = np.arange(4.0)
    with pytest.raises(BitassayError, match="no honest scores"):
        log_wealth(good, good[:0])
    for scores, honest in ((np.append(good, math.nan), good), (good, np.append(good, math.nan))):
        with pytest.raises(BitassayError, match="NaN"):
            log_wealth(scores, honest)

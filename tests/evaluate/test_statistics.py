import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.evaluate.statistics import (
    accuracy_interval,
    bootstrap_means,
    difference_interval,
    holm,
    mcnemar,
    paired_difference,
    percentile_interval,
    smallest_difference,
)


def coverage(windows: int, trials: int = 300) -> float:
    """How often the interval of a mean of exponential values holds the true mean, 1."""
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(trials):
        values = rng.exponential(1.0, windows)
        low, high = percentile_interval(bootstrap_means(values[None], trial)[0], windows)
        hits += low <= 1.0 <= high
    return hits / trials


def test_intervals_cover_what_they_claim_even_for_few_windows():
    # The plain percentile interval covers 0.85 and 0.89 of these skewed samples.
    assert coverage(12) > 0.885
    assert coverage(40) > 0.915


@pytest.mark.parametrize(("windows", "level"), [(3, 0.95), (4, 0.95), (4, 0.99), (16, 0.998)])
def test_so_does_one_for_whose_tails_there_are_too_few_resamples(windows, level):
    """The widest that resampling reaches is the range, which holds the mean of 4 in 7 of 8 cases only."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=(2000, windows))
    ends = [percentile_interval(bootstrap_means(one, 0), windows, level) for one in values]
    share = np.mean([low <= 0 <= high for low, high in ends])
    assert level - 0.015 < share <= 1


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(3, 1, 16)
    base, model = difficulty, difficulty + 0.1 + rng.normal(0, 0.01, 16)
    resampled = bootstrap_means(np.stack([base, model]), 0)
    low, high = percentile_interval(resampled[1] - resampled[0], 16)
    assert 0.08 < low < 0.1 < high < 0.12


def test_equal_seeds_resample_equally():
    values = np.arange(10.0)[None]
    assert (bootstrap_means(values, 3) == bootstrap_means(values, 3)).all()
    assert (bootstrap_means(values, 3) != bootstrap_means(values, 4)).any()


def test_one_window_has_no_interval():
    assert percentile_interval(np.ones(100), 1) is None


@pytest.mark.parametrize("windows", [2, 5, 100])
def test_interval_of_a_constant_is_that_constant(windows):
    assert percentile_interval(bootstrap_means(np.full((1, windows), 2.5), 0)[0], windows) == pytest.approx(
        (2.5, 2.5)
    )


def test_an_accuracy_has_wilsons_interval():
    # p = 0.8, n = 10, z = 1.96: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert accuracy_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    with pytest.raises(BitassayError, match="3 right of 2 items"):
        accuracy_interval(3, 2)


@given(st.integers(0, 25), st.integers(0, 25))
def test_mcnemar_is_a_fair_coin(b, c):
    """Against the definition: the chance of a split at most as likely as this one."""
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    p = sum(chance for chance in chances if chance <= chances[b] * (1 + 1e-9))
    assert mcnemar(b, c) == pytest.approx(p)


def rejects(gained, lost, n, delta, z):
    """The score test by brute force: the share of lost pairs that makes the counts most likely at `delta`."""
    shares = np.linspace(max(0, -delta), (1 - delta) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = (n - gained - lost) * np.log(1 - 2 * shares - delta)
        likelihood = likelihood + (gained * np.log(shares + delta) if gained else 0)
        likelihood = likelihood + (lost * np.log(shares) if lost else 0)
    best = shares[np.nanargmax(likelihood)]
    return abs(gained - lost - n * delta) > z * math.sqrt(n * (2 * best + delta - delta**2))


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(12, 2, 50), (3, 9, 40), (1, 1, 8), (0, 4, 30), (20, 0, 60)]
)
def test_the_interval_of_a_difference_holds_what_the_score_test_does_not_reject(gained, lost, n):
    low, high = difference_interval(gained, lost, n)
    z = 1.959964
    assert low < (gained - lost) / n < high
    for end, inwards in ((low, 1), (high, -1)):
        assert rejects(gained, lost, n, end - inwards * 2e-3, z)
        assert not rejects(gained, lost, n, end + inwards * 2e-3, z)


def test_the_interval_of_a_difference_turns_round_with_the_models():
    low, high = difference_interval(7, 3, 40)
    assert difference_interval(3, 7, 40) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 5), (5, 0, 5), (0, 5, 5), (0, 0, 1), (1, 0, 1)])
def test_intervals_of_extreme_differences_stay_inside(gained, lost, n):
    low, high = difference_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high


def test_difference_intervals_cover_what_they_claim():
    rng = np.random.default_rng(3)
    draws = rng.multinomial(80, [0.15, 0.07, 0.78], size=1500)
    found = [difference_interval(int(gained), int(lost), 80) for gained, lost, _ in draws]
    covered = np.mean([low <= 0.08 <= high for low, high in found])
    assert 0.93 < covered < 0.975


def test_paired_difference_counts_who_alone_is_right():
    found = paired_difference([True, True, False, False, True], [True, False, True, True, True])
    assert (found.first_only, found.second_only, found.items) == (1, 2, 5)
    assert found.difference == pytest.approx(0.2)
    assert found.p_value == 1
    assert found.interval[0] < 0.2 < found.interval[1]
    with pytest.raises(BitassayError, match="cannot be paired"):
        paired_difference([True], [True, False])


def test_holm_adjusts_step_by_step():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "discordant"), [(300, 40), (300, 0), (100, 13), (1000, 200)])
def test_the_smallest_difference_is_seen_as_often_as_it_says(n, discordant):
    difference = smallest_difference(n, discordant)
    m = max(discordant, 6)
    wins = np.random.default_rng(1).binomial(m, (1 + difference * n / m) / 2, size=4000)
    seen = np.mean([mcnemar(int(w), m - int(w)) <= 0.05 for w in wins])
    assert 0.77 < seen < 0.83

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import (
    FEWEST,
    clopper_pearson_interval,
    difference_interval,
    exp_mean_of,
    geometric_interval,
    holm,
    jackknife_of,
    log_difference_interval,
    log_interval,
    log_ratio_interval,
    logit_interval,
    mcnemar,
    mean_of,
    median_interval,
    paired_difference,
    smallest_difference,
    standard_error,
    student_interval,
    visible_difference,
    wilson_interval,
)


@pytest.fixture(scope="module")
def coverage(benchmark):
    return benchmark("coverage")


@pytest.mark.parametrize(
    ("case", "n", "least"),
    [
        ("KL, lognormal, sigma 0.5", 4, 0.9),
        ("KL, lognormal, sigma 0.5", 16, 0.91),
        ("KL, lognormal, sigma 1", 16, 0.86),
        ("agreement 90 %, windows of 127 tokens", 4, 0.9),
        ("agreement 90 %, windows of 127 tokens", 16, 0.92),
        ("perplexity, skewed losses", 16, 0.9),
        ("perplexity less the base's, 3 % more", 8, 0.9),
        ("perplexity less the base's, 50 times", 16, 0.89),
        ("KL less another's", 8, 0.91),
        ("ratios of times", 3, 0.92),
        ("identical texts, 10 %", 16, 0.9),
        ("median", 12, 0.94),
    ],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(coverage, case, n, least):
    held, given = coverage.measured(coverage.CASES[case], n, 400, np.random.default_rng(1))
    assert least <= held <= 0.99
    assert given > 0.95


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(3, 1, 16)
    base, model = difficulty, difficulty + 0.1 + rng.normal(0, 0.01, 16)
    low, high = log_difference_interval(mean_of(base), mean_of(model))
    assert 0.08 < low < 0.1 < high < 0.12


positive = st.floats(1e-6, 1e6)
values_above_0 = st.lists(positive, min_size=FEWEST, max_size=40)
pairs_above_0 = st.lists(st.tuples(positive, positive), min_size=FEWEST, max_size=40)
shares = st.lists(st.floats(0, 1), min_size=FEWEST, max_size=40)


def check(interval, estimate, low=-math.inf, high=math.inf):
    """Where there is an interval, it is finite, within the range, and holds the estimate."""
    if interval is not None:
        near = 1e-9 * abs(estimate) + 1e-300
        assert all(map(math.isfinite, interval))
        assert low <= interval[0] <= estimate + near
        assert estimate - near <= interval[1] <= high


@given(values_above_0)
def test_intervals_of_what_is_positive(values):
    check(log_interval(mean_of(values)), np.mean(values), low=0)
    check(geometric_interval(values), math.exp(np.log(values).mean()), low=0)
    middle = np.quantile(values, 0.5, method="inverted_cdf")
    check(median_interval(values), middle, min(values), max(values))


@given(shares)
def test_intervals_of_what_is_bounded(values):
    check(logit_interval(mean_of(values)), np.mean(values), 0, 1)
    points = [100 * value for value in values]
    check(logit_interval(mean_of(points), 0, 100), np.mean(points), 0, 100)


@given(pairs_above_0)
def test_a_difference_lies_where_both_can_be(values):
    first, second = (mean_of(one) for one in zip(*values, strict=True))
    found = log_difference_interval(first, second)
    check(log_ratio_interval(first, second), second.value / first.value, low=0)
    if found is not None:
        larger = max(first.value, second.value)
        assert found[0] - 1e-9 * larger <= second.value - first.value <= found[1] + 1e-9 * larger
        assert found[0] >= -first.value if second.value >= first.value else found[1] <= second.value
        assert log_difference_interval(second, first) == pytest.approx((-found[1], -found[0]))


@given(st.integers(0, 50), st.integers(1, 50))
def test_a_share_has_an_interval_that_is_never_a_point(some, more):
    items = some + more
    for count in (0, some, items):
        for low, high in (wilson_interval(count, items), clopper_pearson_interval(count, items)):
            assert 0 <= low <= count / items <= high <= 1
            assert low < high


@given(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=8).filter(lambda v: max(v) - min(v) > 0.01))
def test_intervals_shrink_with_more_of_the_same(values):
    for make in (logit_interval, log_interval, student_interval):
        few, many = (make(mean_of(values * times)) for times in (1, 4))
        assert many[1] - many[0] < few[1] - few[0]


@pytest.mark.parametrize(
    "values", [[1.0] * 9, [0.1 + 0.2] * 5, [0.0] * 4, [2.0], [0.2, 0.3], [0.1, math.nan, 0.2, 0.3]]
)
@pytest.mark.parametrize("make", [log_interval, logit_interval, student_interval])
def test_there_is_none_where_nothing_is_known_of_the_spread(make, values):
    assert make(mean_of(values)) is None


@pytest.mark.parametrize("losses", [[1.0, math.inf, 2.0], [700.0, 900.0, 800.0, 1000.0], [1e308, 1.0, 5.0]])
def test_what_overflows_has_none_either(losses):
    found, base = exp_mean_of(losses), exp_mean_of(range(1, len(losses) + 1))
    assert log_interval(found) is None
    assert log_difference_interval(base, found) is None
    assert log_ratio_interval(base, found) is None
    assert visible_difference(base, found) is None


def test_two_that_are_equal_on_every_unit_differ_by_nothing():
    same = mean_of([0.1, 0.5, 0.2])
    assert log_difference_interval(same, mean_of(same.parts)) == (0, 0)
    assert log_ratio_interval(same, mean_of(same.parts)) == (1, 1)
    assert log_difference_interval(mean_of([0.1]), mean_of([0.1])) is None
    assert log_difference_interval(same, mean_of(same.parts + 0.25)) is None  # apart, by we know not how much


def test_a_huge_spread_stays_finite_or_has_no_interval():
    check(log_interval(mean_of([1e-300, 1e300, 1.0])), np.mean([1e-300, 1e300, 1.0]), low=0)
    check(geometric_interval([1e-9, 1e9, 1.0]), 1.0, low=0)
    assert geometric_interval([1e-300, 1e300, 1.0]) is None
    assert geometric_interval([0.0, 1.0, 2.0]) is None


def test_intervals_follow_their_scale():
    values = [0.9, 0.8, 0.95, 0.7]
    low, high = logit_interval(mean_of(values))
    assert logit_interval(mean_of([1 - value for value in values])) == pytest.approx((1 - high, 1 - low))
    low, high = log_interval(mean_of(values))
    assert log_interval(mean_of([3 * value for value in values])) == pytest.approx((3 * low, 3 * high))


def test_the_formulas():
    """By hand: t of 2 degrees of freedom is 4.302653, the standard error of 1, 2, 3 is 1 / sqrt 3."""
    reach = 4.302653 / math.sqrt(3)
    assert student_interval(mean_of([1, 2, 3])) == pytest.approx((2 - reach, 2 + reach))
    assert log_interval(mean_of([1, 2, 3])) == pytest.approx(
        (2 * math.exp(-reach / 2), 2 * math.exp(reach / 2))
    )
    logit = reach / (8 * 0.25 * 0.75)  # 2 of 0 to 8
    odds = [1 / 3 * math.exp(sign * logit) for sign in (-1, 1)]
    assert logit_interval(mean_of([1, 2, 3]), 0, 8) == pytest.approx([8 * one / (1 + one) for one in odds])


def test_a_median_lies_between_its_order_statistics():
    assert median_interval(range(5)) is None  # all five hold it in 93.75 % of cases only
    assert median_interval(range(6)) == (0, 5)
    assert median_interval(range(1, 21)) == (6, 15)  # P(Binomial(20, 1/2) < 6) = 0.0207, < 7: 0.0577


def test_the_jackknife_of_a_mean_is_its_values():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    without = [np.delete(values, place).mean() for place in range(4)]
    assert standard_error(jackknife_of(3.5, without).parts) == pytest.approx(standard_error(values))


def test_the_visible_difference_is_seen_as_often_as_it_says():
    rng, seen, n, sd = np.random.default_rng(2), [], 16, 0.2
    true = visible_difference(
        mean_of(np.zeros(n)), mean_of(sd * np.sqrt((n - 1) / n) * np.tile([1, -1], n // 2))
    )
    for _ in range(600):
        base = rng.normal(10, 1, n)
        low, _ = log_difference_interval(mean_of(base), mean_of(base + true + rng.normal(0, sd, n)))
        seen.append(low > 0)
    assert 0.75 < np.mean(seen) < 0.86
    assert visible_difference(mean_of([1.0, 2.0]), mean_of([1.0, 3.0])) is None


def test_an_accuracy_has_wilsons_interval():
    # p = 0.8, n = 10, z = 1.96: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    expected = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert wilson_interval(8, 10) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(7, 10)[0] < wilson_interval(7.5, 10)[0] < wilson_interval(8, 10)[0]


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
    interval = functools.cache(difference_interval)
    found = [interval(int(gained), int(lost), 80) for gained, lost, _ in draws]
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
    p_value = functools.cache(mcnemar)
    seen = np.mean([p_value(int(w), m - int(w)) <= 0.05 for w in wins])
    assert 0.77 < seen < 0.83

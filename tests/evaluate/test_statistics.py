import numpy as np
import pytest

from bitassay.evaluate.statistics import bootstrap_means, percentile_interval


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

"""Intervals. The unit that is resampled is the window: neighbouring tokens are not independent, windows
nearly are."""

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def bootstrap_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of `values` [..., windows] over resampled windows: [..., RESAMPLES]. Equal seeds resample
    equally, so that differences of two results are paired."""
    count = values.shape[-1]
    picks = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return values.astype(np.float64) @ (picks.T / count)


def percentile_interval(
    resampled: np.ndarray, windows: int, level: float = 0.95
) -> tuple[float, float] | None:
    """The expanded percentile interval of a bootstrap distribution; None for a single window, which says
    nothing of spread.

    A plain percentile interval is too narrow for few windows, by sqrt((n - 1) / n) and by using normal
    instead of t quantiles; the tails are widened to make up for both (Hesterberg 2015, arXiv 1411.5279,
    section 5.3).
    """
    if windows < 2:
        return None
    tail = stats.norm.cdf(np.sqrt(windows / (windows - 1)) * stats.t.ppf((1 - level) / 2, windows - 1))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)

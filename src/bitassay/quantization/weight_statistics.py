"""What the numbers of a weight or of an activation look like: moments, outlier columns, massive values.

Low-bit grids suffer from whatever is far from the rest. Three measures of that, for a matrix of numbers whose
columns are the input dimension of a linear:

    kurtosis          E[(x - m)^4] / v^2: 3 for a Gaussian, more for heavy tails
    outlier columns   columns whose root mean square lies more than 3 standard deviations above the mean of
                      all columns' (the outlier features of LLM.int8(), 2208.07339, by a scale-free rule)
    massive           |x| more than 3 standard deviations from the mean (a fraction), and |x| more than 100
                      times the median |x| (a count): the massive activations of 2402.17762, without its
                      second condition |x| > 100, which depends on the unit

Standard deviation and median are those of each part that is added, such as one window of text: a number is
massive beside its neighbours. Sums are in fp64.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SIGMAS = 3
MEDIANS = 100


class Statistics:
    """Statistics of numbers that arrive in parts with the same columns."""

    def __init__(self, columns: int):
        self.count = 0
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.column_squares = torch.zeros(columns, dtype=torch.float64)
        self.beyond_sigma = self.beyond_median = 0
        self.largest = 0.0

    def add(self, x: Float[Tensor, "rows columns"]) -> None:
        """Add one more part."""
        x = x.detach().float().cpu()
        square = x.square()
        sums = [part.sum(dtype=torch.float64) for part in (x, square, square * x, square.square())]
        self.powers += torch.stack(sums)
        self.column_squares += square.sum(0, dtype=torch.float64)
        self.count += x.numel()
        size, mean, deviation = x.abs(), x.mean(), x.std(correction=0)
        median = size.median()
        self.beyond_sigma += int(((x - mean).abs() > SIGMAS * deviation).sum())
        self.beyond_median += int((size > MEDIANS * median).sum()) if median > 0 else 0
        if median > 0:
            self.largest = max(self.largest, float(size.max() / median))

    def summary(self, prefix: str = "") -> dict[str, Any]:
        """Return the numbers by name, each behind `prefix`; `kurtosis` is None where all values are equal."""
        m1, m2, m3, m4 = (self.powers / self.count).tolist()
        variance = max(m2 - m1**2, 0.0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        # Below that, it is what rounding left of equal numbers.
        varies = variance > 1e-12 * m2
        numbers = {
            "mean": m1,
            "variance": variance,
            "kurtosis": fourth / variance**2 if varies else None,
            "outlier_columns": outlier_columns(self.column_squares),
            "beyond_3_sigma": self.beyond_sigma / self.count,
            "beyond_100_medians": self.beyond_median,
            "largest_in_medians": self.largest,
        }
        return {prefix + name: value for name, value in numbers.items()}


def outlier_columns(squares: Float[Tensor, " columns"]) -> int:
    """Return how many columns stand out, by their sums of squares."""
    size = squares.sqrt()
    return int((size > size.mean() + SIGMAS * size.std(correction=0)).sum())

"""Thresholds: how large an input of a linear may be before it is clipped, from calibration text.

Every rule returns T; the scale is T / (largest code), so that what is beyond T is clipped.

    absmax          the largest magnitude: nothing is clipped
    percentile      p percent of the magnitudes are at most T
    moving_average  of the batches' largest magnitudes, T <- m T + (1 - m) max |x|: one odd batch moves it
                    little (1712.05877, section 3.1)
    kl              the T whose clipped and rounded histogram is nearest, in KL divergence, to the clipped one
                    (S. Migacz, "8-bit inference with TensorRT", GTC 2017): for each i from the number of
                    levels on, P is the first i bins with all the rest added to the last one; Q is the first i
                    bins merged into `levels` equal parts, each part's mass spread evenly over those of its
                    bins that were not empty
    learned         the T with the least `sum_j c_j sum (x_j - x'_j)^2`, c_j the squared norm of column j of
                    the weights: the error of the linear's output, its covariances left out. Learned by
                    gradient descent on log s; the codes are constant almost everywhere, so that the exact
                    derivative of an error is `-2 c_j (x - q s) q`

For an asymmetric grid absmax, percentile and moving_average find both ends alike, with 0 always inside.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.codes.rounding import nearest
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.shapes import Columns

HISTOGRAM_BINS = 2048
LEARNING_STEPS = 120


class Span(NamedTuple):
    """What is not clipped: [low, high], which holds 0."""

    low: float
    high: float


def percentile_threshold(x: Float[Tensor, "..."], percentile: float) -> float:
    """Return the smallest magnitude that at least `percentile` percent of `x` do not exceed."""
    magnitudes = x.abs().flatten().float()
    rank = max(1, math.ceil(percentile / 100 * magnitudes.numel() - 1e-9))
    return magnitudes.kthvalue(rank).values.item()


def percentile_span(x: Float[Tensor, "..."], percentile: float) -> Span:
    """Return the same for each side of zero: the percentile, and its mirror image, of the values."""
    values = x.flatten().float()
    rank = max(1, math.ceil(percentile / 100 * values.numel() - 1e-9))
    high, low = values.kthvalue(rank).values.item(), -(-values).kthvalue(rank).values.item()
    return Span(min(low, 0.0), max(high, 0.0))


def moving_average(maxima: list[float], momentum: float) -> float:
    """Return the moving average of the batches' largest values in their order, from the first on."""
    average = maxima[0]
    for largest in maxima[1:]:
        average = momentum * average + (1 - momentum) * largest
    return average


def kl_threshold(x: Float[Tensor, "..."], levels: int, bins: int = HISTOGRAM_BINS) -> float:
    """Return the edge of the last of `bins` bins that is not clipped; `levels`: codes of one sign."""
    magnitudes = x.abs().flatten().float().cpu().numpy()
    largest = float(magnitudes.max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    counts = np.histogram(magnitudes, bins=bins, range=(0, largest))[0].astype(np.float64)
    # Zeros are exact on every grid and say nothing about its width, and they are many after an activation
    # function.
    counts[0] = counts[1]
    divergences = [_clipped_divergence(counts, kept, levels) for kept in range(levels, bins + 1)]
    return (levels + int(np.argmin(divergences))) * largest / bins


def _clipped_divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) for a threshold after `kept` bins; infinite where Q rules out what P holds."""
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    part = np.arange(kept) * levels // kept
    mass, filled = np.bincount(part, inside, levels), np.bincount(part, inside > 0, levels)
    q = np.where(inside > 0, (mass / np.maximum(filled, 1))[part], 0)
    held = p > 0
    if (q[held] == 0).any():
        return math.inf
    p, q = p[held] / p.sum(), q[held] / q.sum()
    return float((p * np.log(p / q)).sum())


def learned_threshold(x: Float[Tensor, "rows in"], column_weight: Columns, fmt: NumberFormat) -> float:
    """Descend (by Adam) on log s from the absmax scale; return the T of the step with the least error."""
    x = x.float()
    start = x.abs().max().clamp(min=torch.finfo(torch.float32).tiny) / fmt.largest
    shift, first, second = torch.zeros(3, device=x.device).unbind()
    best, least = start, torch.tensor(torch.inf)
    total = (column_weight * x.square()).sum().clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(LEARNING_STEPS):
        scale = start * shift.exp()
        grid = Grid(fmt, scale.view(1, 1))
        codes, rounded = nearest(x, grid)
        error = rounded - x
        loss = (column_weight * error.square()).sum() / total
        if loss < least:
            best, least = scale, loss
        gradient = (2 * column_weight * error * codes).sum() * scale / total
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient.square()
        direction = (first / (1 - 0.8 ** (step + 1))) / (second / (1 - 0.95 ** (step + 1))).sqrt()
        rate = 0.1 * (1 + math.cos(math.pi * step / LEARNING_STEPS)) / 2
        shift = shift - rate * direction.nan_to_num()
    return best.item() * fmt.largest

"""Thresholds against brute force: sorted lists, a loop over bins, a scan over scales."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.codes.rounding import nearest
from bitassay.quantization.inputs.thresholds import (
    kl_threshold,
    learned_threshold,
    moving_average,
    percentile_span,
    percentile_threshold,
)
from bitassay.quantization.recipe.formats import INPUT_FORMATS


def sample(seed: int, *shape: int, tail: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * (1 + tail * torch.rand(shape, generator=generator) ** 20)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30), st.floats(50, 100))
@settings(deadline=None, max_examples=200)
def test_percentile_is_the_smallest_that_enough_values_do_not_exceed(values, percentile):
    x = torch.tensor(values, dtype=torch.float32)
    needed = percentile / 100 * len(values) - 1e-9
    enough = lambda numbers: min(t for t in numbers if sum(v <= t for v in numbers) >= needed)  # noqa: E731
    assert percentile_threshold(x, percentile) == enough([abs(v) for v in values])
    low, high = percentile_span(x, percentile)
    assert high == max(0, enough(values))
    assert low == min(0, -enough([-v for v in values]))


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_agrees_with_numpy(percentile):
    x = sample(0, 300, 701)
    expected = np.percentile(x.abs().numpy(), percentile, method="inverted_cdf")
    assert percentile_threshold(x, percentile) == expected


def test_moving_average_weighs_each_batch_by_its_age():
    assert moving_average([4.0], 0.9) == 4
    got = moving_average([1.0, 2.0, 5.0], 0.75)
    assert got == pytest.approx(0.75**2 * 1 + 0.75 * 0.25 * 2 + 0.25 * 5)
    assert moving_average([1.0, 2.0, 5.0], 0.0) == 5


def kl_by_loops(magnitudes: list[float], levels: int, bins: int) -> float:
    """The same search with nothing but loops."""
    largest = max(magnitudes)
    counts = [0.0] * bins
    for value in magnitudes:
        counts[min(int(value / largest * bins), bins - 1)] += 1
    counts[0] = counts[1]
    best, least = None, math.inf
    for kept in range(levels, bins + 1):
        p = counts[:kept]
        p[-1] += sum(counts[kept:])
        q = [0.0] * kept
        for level in range(levels):
            members = [b for b in range(kept) if b * levels // kept == level and counts[b] > 0]
            for b in members:
                q[b] = sum(counts[m] for m in members) / len(members)
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += math.inf if b == 0 else a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
        if divergence < least:
            best, least = kept, divergence
    assert best is not None
    return best * largest / bins


@pytest.mark.parametrize("tail", [0.0, 10.0])
@pytest.mark.parametrize(("levels", "bins"), [(8, 64), (32, 96)])
def test_kl_threshold_is_what_plain_loops_find(levels, bins, tail):
    x = sample(3, 3000, tail=tail)
    expected = kl_by_loops(x.abs().double().tolist(), levels, bins)
    assert kl_threshold(x, levels, bins) == pytest.approx(expected, rel=1e-6)


def test_kl_clips_a_far_outlier_and_little_else():
    x = sample(1, 40000)
    x[0] = 60.0
    assert 3 < kl_threshold(x, 128) < 20
    assert kl_threshold(torch.zeros(10), 128) == 0


def weighed_error(x, column_weight, fmt, threshold: float) -> float:
    _, rounded = nearest(x, Grid(fmt, torch.tensor([[threshold / fmt.largest]])))
    return (column_weight * (rounded - x).square()).sum().item()


@pytest.mark.parametrize("name", ["int4", "int6", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("tail", [0.0, 10.0])
def test_learned_threshold_is_about_as_good_as_the_best_of_a_fine_scan(name, tail):
    fmt, x = INPUT_FORMATS[name], sample(5, 200, 40, tail=tail)
    column_weight = torch.linspace(0.1, 2, 40)
    largest = x.abs().max().item()
    scanned = [weighed_error(x, column_weight, fmt, largest * k / 400) for k in range(20, 401)]
    learned = weighed_error(x, column_weight, fmt, learned_threshold(x, column_weight, fmt))
    assert learned < 1.03 * min(scanned)
    assert learned <= weighed_error(x, column_weight, fmt, largest)


def test_learned_threshold_listens_to_the_weights():
    x = sample(6, 200, 2)
    x[:, 1] *= 8
    small, large = (
        learned_threshold(x, torch.tensor(weight), INPUT_FORMATS["int4"]) for weight in ([1.0, 0], [0, 1.0])
    )
    assert small < large / 4


def test_inputs_that_are_all_zero_learn_something_finite():
    assert math.isfinite(learned_threshold(torch.zeros(4, 3), torch.ones(3), INPUT_FORMATS["int8"]))

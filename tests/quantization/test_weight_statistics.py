"""Moments are scipy's, and what stands out is counted."""

import pytest
import torch
from scipy import stats

from bitassay.quantization.weight_statistics import Statistics, outlier_columns


def numbers(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summary(*parts) -> dict:
    found = Statistics(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found.summary()


def test_moments_of_parts_are_those_of_the_whole():
    x = numbers(300, 40) ** 3 + 5
    found = summary(x[:90], x[90:250], x[250:])
    flat = x.double().flatten().numpy()
    assert found["mean"] == pytest.approx(flat.mean())
    assert found["variance"] == pytest.approx(flat.var())
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(flat, fisher=False), rel=1e-5)


def test_a_gaussian_has_a_kurtosis_of_three():
    assert summary(numbers(1000, 100))["kurtosis"] == pytest.approx(3, abs=0.05)


def test_equal_numbers_have_none():
    for value in (0.0, 7.3):
        found = summary(torch.full((20, 30), value))
        assert found["kurtosis"] is None
        assert found["variance"] == pytest.approx(0, abs=1e-9)
        assert found["beyond_3_sigma"] == found["beyond_100_medians"] == found["outlier_columns"] == 0


def test_columns_that_stand_out_are_counted():
    x = numbers(200, 60)
    assert summary(x)["outlier_columns"] == 0
    x[:, [3, 41]] *= 20
    assert summary(x)["outlier_columns"] == 2
    assert outlier_columns(x.square().sum(0)) == 2


def test_massive_values_are_counted_beside_their_own_part():
    quiet, loud = numbers(100, 50), 1000 * numbers(100, 50, seed=1)
    assert summary(quiet, loud)["beyond_100_medians"] == 0
    quiet[7, 9] = -500.0
    found = summary(quiet, loud)
    assert found["beyond_100_medians"] == 1
    assert found["largest_in_medians"] == pytest.approx(float(500 / quiet.abs().median()), rel=1e-4)
    assert 0 < found["beyond_3_sigma"] < 0.01


def test_names_get_their_prefix():
    found = Statistics(2)
    found.add(torch.eye(2))
    assert set(found.summary("input_")) == {f"input_{name}" for name in found.summary()}

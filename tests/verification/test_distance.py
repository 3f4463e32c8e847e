import math

import pytest
import torch

from bitassay.engines.decode import Prefill
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.distance import CEILING, DISTANCE, distance_floor, relative_distances


def test_distance_is_the_norm_of_the_difference_over_the_verifiers_norm():
    x, y = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert relative_distances(x, y).tolist() == [pytest.approx(4 / 3), 1]
    assert relative_distances(y, x).tolist() == [pytest.approx(4 / 5), 0.5]


def test_what_cannot_be_computed_is_as_far_as_anything():
    y = torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.inf, 1.0], [1.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [math.nan, 1.0]])
    assert relative_distances(x, y).tolist() == [CEILING, 0, CEILING, CEILING]


def test_log_distances_have_a_floor(trace):
    """One layer; a prompt position that is copied exactly, and one of two generated ones."""
    y = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.bfloat16)
    x = y.clone()
    x[2, 0] = 1.5
    header = trace.header.model_copy(update={"prompt_ids": (1,), "layers": (1,)})
    prefill = Prefill({1: y}, torch.zeros(2, 4))
    (series,) = DISTANCE.measure(Comparison(header, range(3), {1: x}, prefill, y.dtype))
    floor = math.log(distance_floor(torch.bfloat16))
    assert series.prompt == pytest.approx([floor])
    assert series.values == pytest.approx([floor, math.log(0.5)])
    assert DISTANCE.statistic(series.values) == pytest.approx((floor + math.log(0.5)) / 2)


def test_the_floor_is_below_what_rounding_alone_gives():
    exact = torch.randn(200, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        distances = relative_distances(exact.to(dtype), exact)
        assert distances.min() > distance_floor(dtype)
        assert distances.max() < 3 * distance_floor(dtype)

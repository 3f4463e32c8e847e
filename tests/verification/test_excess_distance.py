import math

import pytest
import torch

from bitassay.engines.decode import Prefill
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.distance import distance_floor
from bitassay.verification.detectors.excess_distance import check, check_own


@pytest.fixture
def compared(honest):
    """Return a function of the relative errors of host and verifier: a comparison whose states have them, in
    directions of their own, at each position of each layer."""
    header, generator = honest[0].header, torch.Generator().manual_seed(0)
    shape = (len(header.positions), 64)
    reference, host, own = (
        {layer: torch.randn(shape, generator=generator) for layer in header.layers} for _ in range(3)
    )

    def moved(error, directions):
        return {
            layer: r + error * r.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(directions[layer])
            for layer, r in reference.items()
        }

    def make(host_error, own_error):
        return Comparison(
            header,
            header.positions,
            moved(host_error, host),
            Prefill(moved(own_error, own), torch.empty(0, 1)),
            torch.float32,
            Prefill(reference, torch.empty(0, 1)),
        )

    return make


def test_it_is_the_log_ratio_of_both_errors(compared):
    for series in check(compared(0.06, 0.02), None):
        assert series.values == pytest.approx([math.log(3)] * len(series.values), abs=1e-4)
        assert series.prompt == pytest.approx([math.log(3)] * len(series.prompt), abs=1e-4)


def test_what_a_text_does_to_both_cancels_and_what_a_host_adds_does_not(compared):
    quiet, noisy, dishonest = (
        [value for series in check(compared(*errors), None) for value in series.values]
        for errors in ((0.01, 0.01), (0.2, 0.2), (0.2, 0.1))
    )
    assert noisy == pytest.approx(quiet, abs=1e-4)
    assert dishonest == pytest.approx([value + math.log(2) for value in noisy], abs=1e-4)


def test_the_verifiers_own_error_does_not_depend_on_the_host(compared):
    for host_error in (0.0, 0.02, 5.0):
        for series in check_own(compared(host_error, 0.02), None):
            assert series.values == pytest.approx([math.log(0.02)] * len(series.values), abs=1e-4)


def test_equal_states_have_the_floor_and_not_minus_infinity(compared):
    floor = math.log(distance_floor(torch.float32))
    for series in check(compared(0.0, 0.02), None):
        assert series.values == pytest.approx([floor - math.log(0.02)] * len(series.values), abs=1e-4)

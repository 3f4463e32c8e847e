import numpy as np
import pytest
from test_calibrate import synthetic

from bitassay.verification.detectors.registry import DECIDING
from bitassay.verification.left_out import by_others


def runs(seed, farther=()):
    """Honest runs of eight domains; some are so much farther off than the others."""
    rng = np.random.default_rng(seed)
    shifts = dict(farther)
    return {name: [synthetic(rng, 24, shifts.get(name, 0.0)) for _ in range(20)] for name in "abcdefgh"}


def refused(honest, judged, detectors, *, alpha, **options):
    answers = by_others(honest, judged, detectors, alpha=alpha, **options)
    return {domain: answer.refused(alpha) for domain, answer in answers.items()}


def test_domains_like_the_others_are_refused_no_more_than_promised():
    counts = [
        sum(refused(honest, honest, DECIDING, shortest=8, alpha=0.05).values())
        for honest in map(runs, range(3))
    ]
    assert sum(counts) <= 0.05 * 3 * 160
    assert all(count < 0.1 * 160 for count in counts)


def test_a_domain_is_judged_by_the_others_alone():
    honest = runs(0, {"c": 1.0})
    counts = refused(honest, honest, DECIDING, shortest=8, alpha=0.05)
    assert counts.pop("c") == 20
    assert sum(counts.values()) <= 0.05 * 140


@pytest.mark.parametrize(("guarantee", "alpha"), [("conditional", 0.02), ("average", 0.005)])
def test_too_few_others_say_nothing(guarantee, alpha):
    honest = runs(0)
    assert refused(honest, honest, DECIDING, shortest=8, alpha=alpha, guarantee=guarantee) == {}

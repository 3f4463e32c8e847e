"""Fit mean and standard deviation of each statistic to honest runs, by length (`scores.py`)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.observe import Observation
from bitassay.verification.scores import Fit, Statistic, statistics

MIN_FIT = 8


def split(runs: Sequence[Observation]) -> tuple[list[Observation], list[Observation], list[Observation]]:
    """Return fit (a fifth), conformal (three fifths) and held-out (a fifth) parts, in the order given."""
    fifth = max(len(runs) // 5, MIN_FIT)
    return list(runs[:fifth]), list(runs[fifth:-fifth]), list(runs[-fifth:])


def fit_by_length(
    runs: Sequence[Observation], detectors: Sequence[str], shortest: int
) -> dict[str, tuple[Fit, ...]]:
    """Return the fits of all series over the runs cut at several lengths."""
    lengths = fit_lengths([run.positions for run in runs], shortest)
    cut = {
        n: [statistics(run, detectors, n, n + 1) or [] for run in runs if run.positions >= n] for n in lengths
    }
    return fit(cut)


def fit_lengths(reached: Sequence[int], shortest: int) -> list[int]:
    """Return `shortest`, then lengths a factor of sqrt(2) apart up to what at least MIN_FIT of the runs have
    `reached`."""
    longest = sorted(reached)[-MIN_FIT]
    steps = math.ceil(2 * math.log2(longest / shortest))
    return sorted({*(round(shortest * 2 ** (step / 2)) for step in range(steps)), longest})


def fit(honest: Mapping[int, Sequence[Sequence[Statistic]]]) -> dict[str, tuple[Fit, ...]]:
    """Return the fits of all series. honest: by length, the statistics of runs cut there."""
    lengths = tuple(honest)
    values: dict[tuple[str, int], list[list[float]]] = {}
    for position, runs in enumerate(honest.values()):
        for run in runs:
            for detector, series, part, value in run:
                if part == "generated":
                    by_length = values.setdefault((detector, series), [[] for _ in lengths])
                    by_length[position].append(value)
    fits: dict[str, tuple[Fit, ...]] = {}
    for (detector, _), by_length in values.items():
        smallest = DETECTORS[detector].smallest_sd
        curve = Fit(
            lengths=lengths,
            mean=tuple(float(np.mean(several)) for several in by_length),
            sd=tuple(max(float(np.std(several, ddof=1)), smallest) for several in by_length),
        )
        fits[detector] = (*fits.get(detector, ()), curve)
    return fits

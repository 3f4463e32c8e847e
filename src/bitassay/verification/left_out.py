"""Honest runs of texts that calibration has not seen: how many does a profile refuse?

Each domain of text is left out once: the runs of all others are shuffled and split as `calibrate` does, and
those of the domain are judged by them. This is cross-validation by groups: it measures what a user sees whose
texts are of a domain of their own. Runs of unusual text count as refused too, which `verify` may call
INCONCLUSIVE; and the runs that `calibrate` holds out give scores here, where those of the domain are held
out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bitassay.verification.fitting import MIN_FIT, fit_by_length, split
from bitassay.verification.observe import Observation
from bitassay.verification.scores import Fits, Guarantee, refusal, runs_needed, score, statistics

Runs = Mapping[str, Sequence[Observation]]


def refused(
    honest: Runs,
    judged: Runs,
    detectors: Sequence[str],
    *,
    shortest: int,
    alpha: float,
    guarantee: Guarantee = "conditional",
    seed: int = 0,
) -> dict[str, int]:
    """Return by domain how many of the `judged` runs are refused by the `honest` runs of all other domains.
    shortest: generated positions of the shortest run. A domain is left out of the answer where the others
    have too few runs for `alpha`."""
    counts: dict[str, int] = {}
    for domain, runs in judged.items():
        others = [run for name, several in honest.items() if name != domain for run in several]
        order = np.random.default_rng(seed).permutation(len(others))
        fitted, conformal, held_out = split([others[index] for index in order])
        scored = [*conformal, *held_out]
        if len(others) < 4 * MIN_FIT or len(scored) < runs_needed(alpha, guarantee):
            continue
        fits = fit_by_length(fitted, detectors, shortest)
        scores = [_score(run, fits) for run in scored]
        counts[domain] = sum(refusal(_score(run, fits), scores, guarantee) <= alpha for run in runs)
    return counts


def _score(run: Observation, fits: Fits) -> float:
    return score(statistics(run, list(fits)), fits, run.positions)

"""Honest runs of texts that calibration has not seen: how many does a profile refuse?

Each domain of text is left out once: the runs of all others are shuffled and split as `calibrate` does, and
those of the domain are judged by them. This is cross-validation by groups: it measures what a user sees whose
texts are of a domain of their own. Runs of unusual text count as refused too, which `verify` may call
INCONCLUSIVE; and the runs that `calibrate` holds out give scores here, where those of the domain are held
out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bitassay.verification.fitting import MIN_FIT, fit_by_length, split
from bitassay.verification.observe import Observation
from bitassay.verification.scores import (
    Fits,
    Guarantee,
    Statistic,
    ranked_alike,
    refusal,
    runs_needed,
    score,
    statistics,
)

Runs = Mapping[str, Sequence[Observation]]


class Judged(NamedTuple):
    """Runs of one domain: their scores, the smallest alpha at which each is refused, and the honest scores of
    the other domains that they were ranked among."""

    scores: list[float]
    refusals: list[float]
    honest: list[float]

    def refused(self, alpha: float) -> int:
        """Return how many are refused."""
        return sum(value <= alpha for value in self.refusals)


def by_others(
    honest: Runs,
    judged: Runs,
    detectors: Sequence[str],
    *,
    shortest: int,
    alpha: float,
    guarantee: Guarantee = "conditional",
    seed: int = 0,
) -> dict[str, Judged]:
    """Return by domain what the `honest` runs of all other domains say of the `judged` runs. shortest:
    generated positions of the shortest run. A domain is left out of the answer where the others have too few
    runs for `alpha`."""
    computed: dict[tuple[int, int], list[Statistic] | None] = {}

    def score_of(run: Observation, fits: Fits, most: int) -> float:
        """The score of a run cut after `most` generated positions."""
        n = min(run.positions, most)
        if (id(run), n) not in computed:  # its statistics are the same whoever is left out
            computed[id(run), n] = statistics(run, detectors, n, n + 1)
        return score(computed[id(run), n], fits, n)

    answers: dict[str, Judged] = {}
    for domain, runs in judged.items():
        others = [run for name, several in honest.items() if name != domain for run in several]
        order = np.random.default_rng(seed).permutation(len(others))
        fitted, conformal, held_out = split([others[index] for index in order])
        scored = [*conformal, *held_out]
        if len(others) < 4 * MIN_FIT or len(scored) < runs_needed(alpha, guarantee):
            continue
        fits = fit_by_length(fitted, detectors, shortest)
        longest = max(run.positions for run in scored)
        scores = {
            n: [score_of(run, fits, n) for run in scored] for n in {longest, *(run.positions for run in runs)}
        }
        ranked = [
            ranked_alike(score_of(run, fits, longest), scores[run.positions], scores[longest]) for run in runs
        ]
        refusals = [refusal(value, scores[longest], guarantee) for value in ranked]
        answers[domain] = Judged(ranked, refusals, scores[longest])
    return answers

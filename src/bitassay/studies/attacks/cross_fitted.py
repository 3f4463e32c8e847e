"""The judging of the attack study: which runs does a detector catch, at what rate of false accusations?

Requests are dealt into FOLDS. The statistics of a fold's runs are standardised and judged by honest runs of
the other folds only: a quarter of these requests fits mean and spread, the others give the scores that
p-values count. So each run is judged once, by requests that are not its own, and the honest ones give a
held-out rate of false accusations. A run is caught where p = (1 + #{honest scores >= score}) / (n + 1) <=
alpha.

Intervals are Clopper-Pearson, 95 %. For honest runs they take the runs as independent; runs of one request
under several numerics are not quite.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitassay.verification.detectors.registry import DETECTORS, HonestFit, Statistics
from bitassay.verification.observation import GRID, Observation
from bitassay.verification.power import auc, share, threshold, tokens_to

FOLDS = 5


class Court:
    """One pool of honest runs, which decides on runs that answer the same requests in the same order. For
    each detector and number of tokens every fold has a fit and a threshold, by honest runs of the other
    folds."""

    def __init__(self, honest: Mapping[str, Sequence[Observation]], alpha: float):
        self.honest, self.alpha = honest, alpha
        self._judges: dict[tuple[str, int], list[tuple[HonestFit, float]]] = {}

    def decide(self, detector: str, n: int, runs: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Score of each run after n tokens, and whether it is caught."""
        statistics = DETECTORS[detector].statistics
        if (detector, n) not in self._judges:
            known = [
                (index, statistics(one, n)) for pool in self.honest.values() for index, one in enumerate(pool)
            ]
            self._judges[detector, n] = [_judge(known, fold, self.alpha) for fold in range(FOLDS)]
        judges = [self._judges[detector, n][index % FOLDS] for index in range(len(runs))]
        scores = [fit.score(statistics(one, n)) for (fit, _), one in zip(judges, runs, strict=True)]
        caught = [score > limit for (_, limit), score in zip(judges, scores, strict=True)]
        return np.array(scores, np.float64), np.array(caught, bool)

    @functools.cache  # noqa: B019 a court lives as long as its study
    def honest_scores(self, detector: str, n: int) -> np.ndarray:
        """Of all honest runs, each by the fit of its own fold."""
        return np.concatenate([self.decide(detector, n, runs)[0] for runs in self.honest.values()])


def fits(request: int) -> bool:
    """Whether a request's honest runs go into the fit of other folds; those of the others are counted."""
    return request // FOLDS % 4 == 0


def fewest_counted(sequences: int) -> int:
    """The requests that are counted for the fold that has the fewest of them."""
    counted = [request % FOLDS for request in range(sequences) if not fits(request)]
    return min(len(counted) - counted.count(fold) for fold in range(FOLDS))


def _judge(
    known: Sequence[tuple[int, Statistics | None]], fold: int, alpha: float
) -> tuple[HonestFit, float]:
    """Fit and threshold by requests of the other folds: a quarter fits, the others are counted."""
    others = [(index, one) for index, one in known if one is not None and index % FOLDS != fold]
    fit = HonestFit.of([one for request, one in others if fits(request)])
    counted = [fit.score(one) for request, one in others if not fits(request)]
    return fit, threshold(np.array(counted, np.float64), alpha)


def judged_rows(
    attack: str,
    court: Court,
    attacked: Sequence[Observation],
    tokens: int,
    cost: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One row a detector, of runs of `tokens` tokens; `cost`: for each detector what else its row says."""
    grid = [n for n in GRID if n < tokens] + [tokens]
    rows = []
    for name, detector in DETECTORS.items():
        decided = {n: court.decide(name, n, attacked) for n in grid}
        caught = {n: share(int(hits.sum()), len(attacked)) for n, (_, hits) in decided.items()}
        honest_scores = court.honest_scores(name, tokens)
        ranked, found = auc(honest_scores, decided[tokens][0]), caught[tokens]
        fixed = [detector.accepts(one, tokens) for one in attacked]
        by_limits = [accepts for accepts in fixed if accepts is not None]
        rows.append(
            {
                "attack": attack,
                "detector": name,
                "auc": ranked.value,
                "auc_ci": [ranked.low, ranked.high],
                "tpr_at_1pct_fpr": found.value,
                "tpr_ci": [found.low, found.high],
                "tokens_to_99": tokens_to({n: rate.value for n, rate in caught.items()}),
                **cost[name],
                "n_honest": len(honest_scores),
                "n_attacked": len(attacked),
                "tokens": tokens,
                "alpha": court.alpha,
                "sees": "all" if found.low >= 0.9 else "nothing" if found.low <= court.alpha else "some",
                "tpr_by_tokens": {str(n): rate.value for n, rate in caught.items()},
                "refused_at_published_limits": 1 - float(np.mean(by_limits)) if by_limits else None,
            }
        )
    return rows


def honest_rows(courts: Mapping[bool, Court], tokens: int) -> list[dict[str, Any]]:
    """Held-out false accusations of each detector under each of the numerics, and pooled.
    courts: by whether their requests are sampled."""
    rows = []
    for sampled, court in courts.items():
        pool = court.honest
        for detector in DETECTORS:
            refused = {
                name: int(court.decide(detector, tokens, runs)[1].sum()) for name, runs in pool.items()
            }
            counts = {name: (refused[name], len(runs)) for name, runs in pool.items()}
            counts["sampled, pooled" if sampled else "pooled"] = (
                sum(refused.values()),
                sum(map(len, pool.values())),
            )
            accepts = DETECTORS[detector].accepts
            fixed = [accepts(one, tokens) for runs in pool.values() for one in runs]
            decided = [one for one in fixed if one is not None]
            rows += [
                {
                    "numerics": name,
                    "detector": detector,
                    "refused": bad,
                    "n": n,
                    "false_positive_rate": bad / n,
                    "false_positive_ci": list(share(bad, n)[1:]),
                    "refused_at_published_limits": 1 - float(np.mean(decided))
                    if decided and name.endswith("pooled")
                    else None,
                }
                for name, (bad, n) in counts.items()
            ]
    return rows

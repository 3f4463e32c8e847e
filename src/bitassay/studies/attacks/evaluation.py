"""Cross-fitted evaluation of detectors: what does each catch, at what rate of false positives?

Requests are dealt into FOLDS. The statistics of a fold's runs are standardised and judged by honest runs of
the other folds only: a quarter of these requests fits mean and spread, the others give the scores that
p-values count (`verification/scores.py`). So each run is judged once, by requests that are not its own,
and the honest ones give a held-out rate of false positives. A run is detected where p <= alpha.

Intervals are Clopper-Pearson, 95 %. For honest runs they take the runs as independent; runs of one request
under several numerics are not quite.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitassay.verification.detectors.detector import GRID
from bitassay.verification.detectors.registry import DECIDING, DETECTORS
from bitassay.verification.fitting import fit
from bitassay.verification.observe import Observation
from bitassay.verification.power import auc, share, tokens_to
from bitassay.verification.scores import Fits, score, statistics, threshold

FOLDS = 5
COMBINED = "combined"


def evaluated() -> dict[str, tuple[str, ...]]:
    """Return what is evaluated, by name: each detector alone, and those together on which verdicts rest."""
    return {name: (name,) for name in DETECTORS} | {COMBINED: ("structure", *DECIDING)}


@dataclass(frozen=True, eq=False)
class CrossFit:
    """One pool of honest runs by their numerics, which judges runs that answer the same requests in the same
    order. For each detector and number of tokens every fold has a fit and a threshold, by honest runs of the
    other folds."""

    honest: Mapping[str, Sequence[Observation]]
    alpha: float
    evaluated: Mapping[str, tuple[str, ...]] = field(default_factory=evaluated)

    def decide(self, name: str, n: int, runs: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Return the score of each run after n tokens, and whether it is detected."""
        detectors, folds = self.evaluated[name], self._folds(name, n)
        scores, limits = np.empty(len(runs)), np.empty(len(runs))
        for request, run in enumerate(runs):
            fits, limits[request] = folds[request % FOLDS]
            scores[request] = score(statistics(run, detectors, n, n), fits, n)
        return scores, scores > limits

    @functools.cache  # noqa: B019 it lives as long as its study
    def honest_scores(self, name: str, n: int) -> np.ndarray:
        """Return the scores of all honest runs, each by the fit of its own fold."""
        return np.concatenate([self.decide(name, n, runs)[0] for runs in self.honest.values()])

    @functools.cache  # noqa: B019
    def _folds(self, name: str, n: int) -> list[tuple[Fits, float]]:
        """Return fit and threshold of each fold: a quarter of the other folds' requests fits, the others are
        counted."""
        detectors = self.evaluated[name]
        computed = [
            (request, statistics(run, detectors, n, n))
            for runs in self.honest.values()
            for request, run in enumerate(runs)
        ]
        folds = []
        for fold in range(FOLDS):
            others = [(r, values) for r, values in computed if values is not None and r % FOLDS != fold]
            fits = fit({n: [values for request, values in others if in_fit(request)]})
            counted = [score(values, fits, n) for request, values in others if not in_fit(request)]
            folds.append((fits, threshold(np.array(counted, np.float64), self.alpha)))
        return folds


def in_fit(request: int) -> bool:
    """Return whether a request's honest runs go into the fit of other folds; those of the others are
    counted."""
    return request // FOLDS % 4 == 0


def fewest_counted(sequences: int) -> int:
    """Return the number of requests that are counted for the fold that has the fewest of them."""
    counted = [request % FOLDS for request in range(sequences) if not in_fit(request)]
    return min(len(counted) - counted.count(fold) for fold in range(FOLDS))


def refused_at_published_limits(name: str, runs: Sequence[Observation]) -> float | None:
    """Return the share of runs that the published limits of a detector refuse; None where it has none."""
    accepted = [series.accepted for run in runs for series in run.series.get(name, ())]
    refused = [not verdict for verdict in accepted if verdict is not None]
    return sum(refused) / len(refused) if refused else None


def attack_rows(
    attack: str,
    pool: CrossFit,
    attacked: Sequence[Observation],
    tokens: int,
    costs: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Return one row a detector, of runs of `tokens` tokens. costs: for each detector what else its row
    says."""
    grid = [n for n in GRID if n < tokens] + [tokens]
    rows = []
    for name in pool.evaluated:
        decided = {n: pool.decide(name, n, attacked) for n in grid}
        rates = {n: share(int(detected.sum()), len(attacked)) for n, (_, detected) in decided.items()}
        honest_scores = pool.honest_scores(name, tokens)
        ranked, rate = auc(honest_scores, decided[tokens][0]), rates[tokens]
        rows.append(
            {
                "attack": attack,
                "detector": name,
                "auc": ranked.value,
                "auc_ci": [ranked.low, ranked.high],
                "tpr_at_1pct_fpr": rate.value,
                "tpr_ci": [rate.low, rate.high],
                "tokens_to_99": tokens_to({n: rate.value for n, rate in rates.items()}),
                **costs[name],
                "n_honest": len(honest_scores),
                "n_attacked": len(attacked),
                "tokens": tokens,
                "alpha": pool.alpha,
                "sees": "all" if rate.low >= 0.9 else "nothing" if rate.low <= pool.alpha else "some",
                "tpr_by_tokens": {str(n): rate.value for n, rate in rates.items()},
                "refused_at_published_limits": refused_at_published_limits(name, attacked),
            }
        )
    return rows


def honest_rows(pools: Mapping[bool, CrossFit], tokens: int) -> list[dict[str, Any]]:
    """Return the held-out false positives of each detector under each of the numerics, and pooled. pools: by
    whether their requests are sampled."""
    rows = []
    for sampled, pool in pools.items():
        pooled = "sampled, pooled" if sampled else "pooled"
        every = [run for runs in pool.honest.values() for run in runs]
        for detector in pool.evaluated:
            refused = {
                name: (int(pool.decide(detector, tokens, runs)[1].sum()), len(runs))
                for name, runs in pool.honest.items()
            }
            refused[pooled] = (sum(bad for bad, _ in refused.values()), len(every))
            for name, (bad, n) in refused.items():
                fixed = refused_at_published_limits(detector, every) if name == pooled else None
                rows.append(
                    {
                        "numerics": name,
                        "detector": detector,
                        "refused": bad,
                        "n": n,
                        "false_positive_rate": bad / n,
                        "false_positive_ci": list(share(bad, n)[1:]),
                        "refused_at_published_limits": fixed,
                    }
                )
    return rows

"""How often do 95 % intervals hold the truth, by the number of windows, prompts or rounds?

    python benchmarks/coverage.py [--trials 4000]

Draws samples from distributions whose truth is known, skewed as windows of text are, and counts. `-`: no
interval in more than half of the samples. Prints a Markdown table (docs/evaluation.md).
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bitassay.evaluation.statistics import (
    Estimate,
    Interval,
    exp_mean_of,
    geometric_interval,
    log_difference_interval,
    log_interval,
    logit_interval,
    mean_of,
    median_interval,
    wilson_interval,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]
COUNTS = (2, 3, 4, 6, 8, 12, 16, 32, 64)


class Case(NamedTuple):
    """draw: n units; interval: of them; truth: what it should hold."""

    draw: Draw
    interval: Callable[[np.ndarray], Interval]
    truth: float


def losses(rng: np.random.Generator, n: int, spread: float = 0.35) -> np.ndarray:
    """Mean losses of windows in nats: 3.1 on average, skewed to the right (a gamma of shape 4)."""
    return 3.1 - 2 * spread + rng.gamma(4, spread / 2, n)


def gamma_ppl(shift: float, scale: float) -> float:
    """The exponential of the mean of `losses`, moved and scaled: the truth is that of the mean loss."""
    return float(np.exp(3.1 * scale + shift))


def ppl_interval(values: np.ndarray) -> Interval:
    found = exp_mean_of(values)
    ends = log_interval(Estimate(found.value - 1, found.parts))
    return None if ends is None else (ends[0] + 1, ends[1] + 1)


def paired(shift: float, spread: float) -> Draw:
    """[2, n]: losses of a base model, and of one that loses more on each window, itself skewed."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        base = losses(rng, n)
        return np.stack([base, base + shift + spread * (rng.gamma(4, 0.5, n) - 2)])

    return draw


def shared(sigma: float, ratio: float) -> Draw:
    """[2, n]: KL of two models, lognormal, with what both find hard in common."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        hard = rng.lognormal(0, sigma, n)
        return np.stack([hard * rng.lognormal(0, 0.2, n), ratio * hard * rng.lognormal(0, 0.2, n)])

    return draw


def agreement(share: float, correlation: float, tokens: int) -> Draw:
    """Shares of equal tokens in windows, whose own rates vary: a beta-binomial distribution."""
    size = 1 / correlation - 1
    return lambda rng, n: rng.binomial(tokens, rng.beta(share * size, (1 - share) * size, n)) / tokens


def difference(of: Callable[[np.ndarray], Estimate]) -> Callable[[np.ndarray], Interval]:
    return lambda both: log_difference_interval(of(both[0]), of(both[1]))


CASES = {
    "perplexity, skewed losses": Case(losses, ppl_interval, gamma_ppl(0, 1)),
    "perplexity less the base's, 3 % more": Case(
        paired(0.03, 0.03), difference(exp_mean_of), gamma_ppl(0.03, 1) - gamma_ppl(0, 1)
    ),
    "perplexity less the base's, 50 times": Case(
        paired(np.log(50), 0.5), difference(exp_mean_of), gamma_ppl(np.log(50), 1) - gamma_ppl(0, 1)
    ),
    "KL, lognormal, sigma 0.5": Case(
        lambda rng, n: rng.lognormal(0, 0.5, n), lambda v: log_interval(mean_of(v)), float(np.exp(0.125))
    ),
    "KL, lognormal, sigma 1": Case(
        lambda rng, n: rng.lognormal(0, 1, n), lambda v: log_interval(mean_of(v)), float(np.exp(0.5))
    ),
    "KL less another's": Case(shared(0.5, 0.8), difference(mean_of), -0.2 * float(np.exp(0.125 + 0.02))),
    "agreement 90 %, windows of 127 tokens": Case(
        agreement(0.9, 0.02, 127), lambda v: logit_interval(mean_of(v)), 0.9
    ),
    "agreement 99 %, windows of 127 tokens": Case(
        agreement(0.99, 0.05, 127), lambda v: logit_interval(mean_of(v)), 0.99
    ),
    "identical texts, 10 %": Case(
        lambda rng, n: rng.random(n) < 0.1, lambda v: wilson_interval(int(v.sum()), len(v)), 0.1
    ),
    "ROUGE, 30 % of texts equal": Case(
        lambda rng, n: np.where(rng.random(n) < 0.3, 1.0, rng.beta(3, 4, n)),
        lambda v: logit_interval(mean_of(v)),
        0.3 + 0.7 * 3 / 7,
    ),
    "median": Case(lambda rng, n: rng.lognormal(0, 1, n), median_interval, 1.0),
    "ratios of times": Case(lambda rng, n: 1.5 * rng.lognormal(0, 0.1, n), geometric_interval, 1.5),
}


def measured(case: Case, n: int, trials: int, rng: np.random.Generator) -> tuple[float, float]:
    """The share of the intervals that hold the truth, and the share of samples that have an interval."""
    found = [case.interval(case.draw(rng, n)) for _ in range(trials)]
    ends = [one for one in found if one is not None]
    held = sum(low <= case.truth <= high for low, high in ends)
    return held / max(len(ends), 1), len(ends) / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    print("| 95 % interval of | " + " | ".join(f"n = {n}" for n in COUNTS) + " |")
    print("|---" + "|---:" * len(COUNTS) + "|")
    for name, case in CASES.items():
        cells = []
        for n in COUNTS:
            held, given = measured(case, n, trials, np.random.default_rng(n))
            cells.append("-" if given < 0.5 else f"{held:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

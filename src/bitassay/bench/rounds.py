"""Times of things that take turns, and their ratios.

On a shared machine absolute times mean little: a neighbour slows everything by an unknown factor. Within one
round all take their turn under much the same load, so that ratios within rounds are steadier than times:

    r_i = t_base,i / t_other,i        ratio = exp(mean log r_i)        above 1: faster than the base

The interval is Student's, 95 %, of log r over rounds (`evaluation/statistics.py`). It covers what differs
between rounds, not what would differ on another day.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bitassay.evaluation.statistics import NONE, Interval, geometric_interval
from bitassay.record.progress import Progress, silent

RATIO = "Student's t, log scale, of the ratios within rounds"
INTERVAL = f"95 %, {RATIO}; {NONE}"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the base; no interval from too few rounds."""

    value: float
    interval: Interval


def ratio_of(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """Return the ratio of paired times in seconds, one of each a round."""
    ratios = [a / b for a, b in zip(base, other, strict=True)]
    return Ratio(statistics.geometric_mean(ratios), geometric_interval(ratios))


def spread(times: Sequence[float]) -> float | None:
    """(largest - smallest) / median; None of a single time."""
    return None if len(times) < 2 else (max(times) - min(times)) / statistics.median(times)


def turns(names: Sequence[str], round_: int) -> list[str]:
    """Return the order of a round: each begins with another one."""
    start = round_ % len(names)
    return [*names[start:], *names[:start]]


def alternate(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = 0.05,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Seconds of one call of each function, a time a round.

    A measurement is as many calls as take at least `seconds` (short timings snap to the scheduler's ticks),
    found in a warm-up. wait: returns once everything asked of a device is done.
    """

    def timed(function: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        wait()
        return (clock() - start) / calls

    calls = {}
    for name, function in work.items():
        first = timed(function, 1)
        once = first if first > seconds else timed(function, 1)
        calls[name] = max(1, math.ceil(seconds / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds):
        for place, name in enumerate(turns(list(work), round_)):
            times[name].append(timed(work[name], calls[name]))
            progress("timing", round_ * len(work) + place + 1, rounds * len(work))
    return times

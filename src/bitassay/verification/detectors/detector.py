"""What a detector is. It reduces a claimed run to a few series of numbers, and each series to one statistic.

    comparison   the states that a host shows, beside those of the verifier's own prefill of the same tokens
    series       numbers by position or by output token, larger for less honest runs
    statistic    of the first n numbers of a series, by default their mean
    score        the largest statistic, after each was standardised by honest runs (`scores.py`)

A new detector is one file like `distance.py` and one entry: in `registry.py`, or among the entry points
`bitassay.detectors` of another package. It then has a column in `bitassay attack`; with `bitassay calibrate
--detectors NAME` it takes part in the verdicts of that profile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.engines.decode import Prefill
from bitassay.verification.trace import Header

Part = Literal["prompt", "generated"]
Pair = tuple[Prefill, Prefill]  # in the verifier's dtype, and in the next higher precision
Replay = tuple[Prefill, Prefill, Prefill]  # the same, and in the latter with a larger rotary base
GRID = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # token counts at which detectors are compared


@dataclass(frozen=True, eq=False)
class Comparison:
    """A claimed run beside the verifier's prefill of it.

    positions: those whose states are shown, ascending. claimed: the host's states there, by sampled layer.
    verifier: states and logits of all positions. dtype: the verifier's. precise: the same prefill in the
    next higher precision (`engines/precise.py`). replay: both again, computed from the host's states
    (`segment_distance.py`), and so with a larger rotary base (`rotary_base.py`), where these are of all
    positions.
    """

    header: Header
    positions: Sequence[int]
    claimed: Mapping[int, Float[Tensor, "positions hidden"]]
    verifier: Prefill
    dtype: torch.dtype
    precise: Prefill | None = None
    replay: Replay | None = None

    @property
    def n_prompt(self) -> int:
        """Return how many of the positions are in the prompt."""
        return sum(position < len(self.header.prompt_ids) for position in self.positions)

    def pair(self, layer: int) -> tuple[Float[Tensor, "positions hidden"], Float[Tensor, "positions hidden"]]:
        """Return the host's and the verifier's states of a layer at the same positions."""
        return self.claimed[layer], self.verifier.states[layer][list(self.positions)]

    @property
    def reference(self) -> Prefill:
        """Return the prefill in the next higher precision, which detectors that look at it need."""
        assert self.precise is not None, "a comparison without a prefill in the next higher precision"
        return self.precise

    @property
    def replayed(self) -> Replay:
        """Return the replay, which detectors of whole runs need."""
        assert self.replay is not None, "a comparison without a replay"
        return self.replay

    def first(self, n: int) -> "Comparison":
        """Return the comparison of the prompt and the first `n` generated positions."""
        count = self.n_prompt + n
        claimed = {layer: rows[:count] for layer, rows in self.claimed.items()}
        return replace(self, positions=self.positions[:count], claimed=claimed)

    def last(self) -> tuple[Float[Tensor, "generated hidden"], Float[Tensor, "generated hidden"]]:
        """Return both sides' states of the last sampled layer at the generated positions."""
        x, y = self.pair(self.header.layers[-1])
        return x[self.n_prompt :], y[self.n_prompt :]


@dataclass(frozen=True)
class Series:
    """Numbers of a run. values: one a generated position, or one an output token (as the detector says).
    prompt: one a prompt position; judged like the generated ones, whose spread is the larger. accepted:
    whether published limits of the method accept the run."""

    values: tuple[float, ...]
    prompt: tuple[float, ...] = ()
    accepted: bool | None = None


def last(values: Sequence[float]) -> float:
    """Return the last number: the statistic of series that accumulate by themselves."""
    return values[-1]


def _nothing(layers: int, hidden: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Detector:
    """about: what it looks at. check: the verifier's work, from a comparison and from what `prove` has made
    of the host's run (None where it sends nothing else) to the same number of series for every run.
    statistic: of the first numbers of a series. smallest_sd: the spread below which honest runs are not told
    apart. by_token: series are by output token, not by position. divisible: the evidence of the first n
    tokens is a part of the evidence of all; otherwise it is made for each n of GRID. exact: the statistic is
    infinite where exact checks find a defect, else 0. whole: it needs the states of all positions, and says
    nothing about a run of which fewer are shown. evidence_bytes: what a token's evidence takes, for so
    many sampled layers of `hidden` 16-bit numbers."""

    name: str
    about: str
    check: Callable[[Comparison, Any], Sequence[Series]]
    smallest_sd: float = 0.02
    statistic: Callable[[Sequence[float]], float] = fmean
    prove: Callable[[Comparison], Any] | None = None
    by_token: bool = False
    divisible: bool = True
    exact: bool = False
    whole: bool = False
    evidence_bytes: Callable[[int, int], float] = _nothing

    def measure(self, comparison: Comparison) -> tuple[Series, ...]:
        """Return the series of a run whose host sends what this detector needs."""
        if self.divisible or comparison.n_prompt == len(comparison.positions):
            return self.measure_all(comparison)
        tokens = range(1, len(comparison.header.output_ids) + 1)
        runs = {n: self.measure_all(comparison.first(n)) for n in GRID if n in tokens}
        by_token = [runs[max(n for n in runs if n <= token)] for token in tokens]
        return tuple(
            replace(series[-1], values=tuple(value for of_token in series for value in of_token.values))
            for series in zip(*by_token, strict=True)
        )

    def measure_all(self, comparison: Comparison) -> tuple[Series, ...]:
        """Return what `check` makes of what `prove` makes of a run."""
        return tuple(self.check(comparison, self.prove(comparison) if self.prove else None))

    def first(self, series: Series, positions: int, tokens: int) -> tuple[float, ...]:
        """Return the numbers of a series that belong to so many generated positions and output tokens."""
        return series.values[: tokens if self.by_token else positions]

    def statistics(self, series: Series, positions: int, tokens: int) -> dict[Part, float]:
        """Return the statistics of one series: of its first numbers and, where there are any, the
        prompt's."""
        parts: dict[Part, Sequence[float]] = {
            "generated": self.first(series, positions, tokens),
            "prompt": series.prompt,
        }
        return {part: self.statistic(values) for part, values in parts.items() if values}

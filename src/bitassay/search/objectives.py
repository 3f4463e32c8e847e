"""What a search is asked for, and what it makes small: sums of an assay's columns, how they compare, and
which trials stop early.

    kl_mean                             one column
    ppl_delta + 0.01*size_bytes         a sum of several, with weights
    -1*decode_tok_s                     what is better when larger

With several objectives a recipe is better than another only where it dominates it: no objective larger, one
smaller. What no other dominates is the Pareto front.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitassay.data.corpora import check_corpus
from bitassay.engines.arithmetic import Arithmetic
from bitassay.errors import BitassayError, at_least, find
from bitassay.models.options import as_dtype
from bitassay.quantization.recipe.recipe import Recipe, find_recipe, shipped_recipes
from bitassay.search.space import Space

FACTS = ("bits_per_weight", "checkpoint_bits_per_weight", "size_bytes")  # known before anything is run
QUALITY = ("ppl", "ppl_delta", "kl_mean", "kl_median", "kl_p99", "top1_agreement")
SPEED = ("prefill_tok_s", "decode_tok_s")
VERIFICATION = ("hidden_distance",)
SAMPLERS = ("tpe", "nsga2", "grid")
COLUMNS = (*FACTS, *QUALITY, *SPEED, *VERIFICATION)

_TERM = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*)?(?P<column>[a-z]\w*)", re.ASCII)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of columns; smaller is better."""

    text: str
    terms: tuple[tuple[float, str], ...]

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read an objective such as `ppl_delta + 0.01*size_bytes`. Raises BitassayError for anything else,
        and names the columns nearest to an unknown one."""
        terms = []
        for part in re.split(r"(?<!\*)(?<![\d.]e)\+", text):
            match = _TERM.fullmatch(part.strip())
            if match is None:
                raise BitassayError(
                    f"{part.strip()!r} is no objective", "a column, or weight*column + weight*column"
                )
            weight = _number(match["weight"], text) if match["weight"] else 1.0
            terms.append((weight, known_column(match["column"])))
        return cls(text, tuple(terms))

    def value(self, row: Mapping[str, Any]) -> float:
        """Return the weighted sum of one recipe's columns; NaN where a column is missing."""
        values = [(weight, row.get(column)) for weight, column in self.terms]
        return sum(math.nan if value is None else weight * value for weight, value in values)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for _, column in self.terms)


def known_column(name: str) -> str:
    """Return `name` if it is a column. Raises BitassayError that names the nearest columns."""
    return find({column: column for column in COLUMNS}, name, "column", f"one of {', '.join(COLUMNS)}")


def parse_limit(text: str) -> tuple[str, float | Recipe]:
    """Read a limit such as `bits_per_weight=2.3`: a column and its largest value, a number or a recipe whose
    value it is. Raises BitassayError for anything else."""
    name, equals, value = text.partition("=")
    if not equals:
        raise BitassayError(
            f"{text!r} is no limit", "a column and a number or a recipe, such as bits_per_weight=2.3"
        )
    is_recipe = value in shipped_recipes() or value.endswith((".yaml", ".yml"))
    return known_column(name.strip()), find_recipe(value) if is_recipe else _number(value, text)


def _number(text: str, expression: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BitassayError(f"{expression!r}: {text.strip()!r} is no number", "such as 2.3")
    return value


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether `first` is nowhere larger than `second` and somewhere smaller."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other dominates; of equal points only the first."""
    return [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point) for other in points) and point not in points[:index]
    ]


def is_hopeless(
    point: Sequence[float], better: Sequence[Sequence[float]], earlier: int, least: int = 5
) -> bool:
    """Return whether a recipe stops after the short evaluation: at least half of `earlier` recipes
    dominate it (the median rule, where there is one objective). earlier: the number of recipes that may be
    within the limits. better: the points of those known to be. The first `least` recipes never stop."""
    return earlier >= least and 2 * sum(dominates(other, point) for other in better) >= earlier


@dataclass(frozen=True)
class SearchPlan(Arithmetic):
    """What is searched: `space` over `model`, for the least of each of `objectives`, where no column of
    `at_most` is larger. windows: how many of `window` tokens choose (as many are held out); short: how many
    of them come first. seed: of the sampler."""

    model: str
    space: Space
    objectives: tuple[str, ...] = ("kl_mean",)
    at_most: Mapping[str, float] = field(default_factory=dict)
    sampler: str = "tpe"
    corpus: str = "wikitext2-raw"
    window: int = 512
    windows: int = 8
    short: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise BitassayError(f"{self.sampler!r} is no sampler", f"one of {', '.join(SAMPLERS)}")
        as_dtype(self.dtype)
        at_least(1, windows=self.windows, short=self.short)
        at_least(2, window=self.window)
        at_least(0, seed=self.seed)
        if self.short > self.windows:
            raise BitassayError(
                f"{self.short} of {self.windows} windows come first", f"--short 1 to {self.windows}"
            )
        check_corpus(self.corpus)
        if not self.objectives:
            raise BitassayError("there is no objective", "--objective kl_mean")
        for text in self.objectives:
            Objective.parse(text)
        if self.sampler == "grid":
            next(self.space.grid())

    @property
    def parsed(self) -> list[Objective]:
        return [Objective.parse(text) for text in self.objectives]

    def over(self, row: Mapping[str, Any]) -> str | None:
        """Return the first limit that a recipe's columns, as far as they are known, break."""
        for name, most in self.at_most.items():
            if row.get(name, most) > most:
                return f"{name} is {row[name]:.6g}"
        return None

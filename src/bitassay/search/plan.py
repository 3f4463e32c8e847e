"""What a search is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from bitassay.data.corpora import check_corpus
from bitassay.errors import BitassayError, at_least
from bitassay.models.options import AUTO, as_dtype
from bitassay.search.objectives import Objective
from bitassay.search.space import Space

SAMPLERS = ("tpe", "nsga2", "grid")


@dataclass(frozen=True)
class SearchPlan:
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
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = AUTO
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

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return _PLAN.dump_python(self, mode="json")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "SearchPlan":
        """Return the plan that gave `to_dict`, from a dictionary with it."""
        return _PLAN.validate_python({name: content[name] for name in cls.__dataclass_fields__})


_PLAN = TypeAdapter(SearchPlan)

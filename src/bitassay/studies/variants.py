"""A study of variants: models that are made of one base and measured on the same text and questions.

What is asked of it is a plan, which is all that a process on any computer needs to do its share (`cells.py`).
The first variant is the base model itself, which the others are compared with.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from bitassay.data.windows import NamedProtocol
from bitassay.engines.arithmetic import Arithmetic
from bitassay.errors import BitassayError
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.tasks.mmlu import DIRECT, mmlu_subjects
from bitassay.models.options import as_dtype
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.recipe.replication import Chosen
from bitassay.record.run import run_plan
from bitassay.record.versions import versions

Kind = Literal["fake", "real"]


@dataclass(frozen=True)
class Reading:
    """How a model in residual codes is read (`replication/any_precision.py`): its first plane, all planes in
    some layers, and all planes for a token that follows an entropy above `threshold` nats; with a `seed`,
    for as many tokens of a window at random."""

    layers: Chosen | None = None
    threshold: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Variant:
    """One model of a study. recipe: None for the base model and for torchao's. torchao: quantized by it
    instead, smoothed where `smoothed`. format, granularity, kind: of an INT8/FP8 study. reading: None for a
    model that is read as it is."""

    name: str
    format: str | None = None
    granularity: str | None = None
    kind: Kind | None = None
    recipe: Recipe | None = None
    torchao: bool = False
    smoothed: bool = False
    reading: Reading | None = None


@dataclass(frozen=True)
class VariantPlan(Arithmetic):
    """What is asked of a study. protocol: None where no text is read; it says how many windows. questions: of
    MMLU in all, spread over its subjects. drafts: lengths of the drafts of self-speculative decoding. speed:
    whether models are timed. block: windows that the base model reads before the variants do. Raises
    BitassayError for what makes no sense."""

    study: str
    model: str
    variants: tuple[Variant, ...]
    protocol: NamedProtocol | None
    questions: int = 0
    drafts: tuple[int, ...] = ()
    speed: bool = False
    block: int = 4
    dtype: str = field(default="bfloat16", kw_only=True)
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        windows = None if self.protocol is None else self.protocol.windows
        if windows is not None and windows < 1:
            raise BitassayError(f"{windows} windows leave nothing to measure", "--windows 1 or more")

    @property
    def base(self) -> str:
        """The name of the variant that is the base model."""
        return self.variants[0].name

    @property
    def blocks(self) -> list[range]:
        """Which windows are read together."""
        if self.protocol is None:
            return []
        assert self.protocol.windows is not None
        count = self.protocol.windows
        return [range(start, min(start + self.block, count)) for start in range(0, count, self.block)]

    @property
    def subjects(self) -> dict[str, int]:
        """How many questions of each of MMLU's subjects; those with none are left out."""
        names = mmlu_subjects()
        counts = {
            name: (index + 1) * self.questions // len(names) - index * self.questions // len(names)
            for index, name in enumerate(names)
        }
        return {name: count for name, count in counts.items() if count}

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, without the variants."""
        return {key: value for key, value in self.to_dict().items() if key != "variants"}

    def described(self, kind: str, digest: str) -> dict[str, Any]:
        """Return what a run folder belongs to; `digest` is that of the model's weights. Raises BitassayError
        where the questions are not on this machine."""
        questions = self.source_of_questions()
        work = {"plan": self.to_dict(), "weights_digest": digest, "questions": questions}
        return run_plan(kind, work, self.packages)

    @property
    def packages(self) -> list[str]:
        """The packages whose versions a study depends on."""
        others = ["lm-eval"] * bool(self.questions) + ["torchao"] * any(v.torchao for v in self.variants)
        return ["torch", "transformers", *others]

    def versions(self) -> dict[str, str]:
        """Return the versions that this machine would make the study with."""
        return versions(*self.packages)

    def source_of_questions(self) -> dict[str, Any] | None:
        """Return which questions of MMLU this machine has, None where none are asked."""
        if not self.questions:
            return None
        subject, most = max(self.subjects.items(), key=lambda item: item[1])
        data = DIRECT.read(most, subject)
        if data is None:
            raise BitassayError(
                f"{self.questions} questions are up to {most} of a subject of MMLU; 5 come with the package",
                "point BITASSAY_DATA at a folder that has mmlu/mmlu_test.jsonl, or --limit 285",
            )
        return {"source": data.source, "digest": data.digest, "whole": data.is_complete}


@dataclass
class Findings:
    """What the cells of a study found, by variant's name. text: scores by window; facts: what a model stores
    and costs; right: by method, which questions were answered rightly; asked: all that was answered; refused:
    variants that cannot be made here, and why. speed, products: runs of benchmarks."""

    plan: VariantPlan
    variants: dict[str, Variant]
    text: dict[str, list[TokenScores]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    right: dict[str, dict[str, list[bool]]] = field(default_factory=dict)
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, Any] | None = None
    products: dict[str, Any] | None = None

    def has(self, *names: str) -> bool:
        """Return whether these variants answered questions."""
        return all(name in self.right for name in names)

    def called(self, name: str) -> str:
        """Return a variant's name; BASE is the first, whatever the plan calls it."""
        return self.plan.base if name == BASE else name

"""A study of variants: models that are made of one base and measured on the same text and questions.

What is asked of it is a plan, which is all that a process on any computer needs to do its share (`cells.py`).
The first variant is the base model itself, which the others are compared with.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.tasks.mmlu import DIRECT, mmlu_subjects
from bitassay.models.options import AUTO, as_dtype
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.recipe.replication import Chosen
from bitassay.record.versions import versions

SCHEMA = 1

Kind = Literal["fake", "real"]


@dataclass(frozen=True)
class Reading:
    """How a model in residual codes is read (`replication/on_demand.py`): its first plane, all planes in some
    layers, and all planes for a token that follows an entropy above `threshold` nats; with a `seed`, for as
    many tokens of a window at random."""

    layers: Chosen | None = None
    threshold: float | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        layers = None if self.layers is None else self.layers.model_dump(mode="json")
        return asdict(self) | {"layers": layers}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Reading":
        """From `to_dict`."""
        layers = content["layers"]
        return cls(**{**content, "layers": None if layers is None else Chosen.model_validate(layers)})


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

    def to_dict(self) -> dict[str, Any]:
        recipe = None if self.recipe is None else self.recipe.model_dump(mode="json")
        reading = None if self.reading is None else self.reading.to_dict()
        return asdict(replace(self, recipe=None, reading=None)) | {"recipe": recipe, "reading": reading}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Variant":
        """From `to_dict`."""
        recipe, reading = content["recipe"], content["reading"]
        parts = {
            "recipe": None if recipe is None else Recipe.model_validate(recipe),
            "reading": None if reading is None else Reading.of(reading),
        }
        return cls(**{**content, **parts})


@dataclass(frozen=True)
class VariantPlan:
    """What is asked of a study. protocol: None where no text is read; it says how many windows. questions: of
    MMLU in all, spread over its subjects. drafts: lengths of the drafts of self-speculative decoding. speed:
    whether models are timed. block: windows that the base model reads before the variants do. Raises
    BitassayError for what makes no sense."""

    study: str
    model: str
    variants: tuple[Variant, ...]
    protocol: Protocol | None
    questions: int = 0
    drafts: tuple[int, ...] = ()
    speed: bool = False
    block: int = 4
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False
    attention: str = AUTO

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
            name: (place + 1) * self.questions // len(names) - place * self.questions // len(names)
            for place, name in enumerate(names)
        }
        return {name: count for name, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        return asdict(replace(self, variants=())) | {
            "protocol": None if self.protocol is None else self.protocol.id,
            "variants": [variant.to_dict() for variant in self.variants],
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, without the variants."""
        return {key: value for key, value in self.to_dict().items() if key != "variants"}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "VariantPlan":
        """From `to_dict`."""
        parts = {
            "protocol": None if content["protocol"] is None else Protocol.parse(content["protocol"]),
            "variants": tuple(map(Variant.of, content["variants"])),
            "drafts": tuple(content["drafts"]),
        }
        return cls(**{**content, **parts})

    def described(self, kind: str, digest: str) -> dict[str, Any]:
        """What a run folder belongs to; `digest` is that of the model's weights. Raises BitassayError where
        the questions are not on this machine."""
        return {
            "kind": kind,
            "schema": SCHEMA,
            "plan": self.to_dict(),
            "weights_digest": digest,
            "questions": self.source_of_questions(),
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """What this machine would make the study with."""
        others = ["lm-eval"] * bool(self.questions) + ["torchao"] * any(v.torchao for v in self.variants)
        return versions("torch", "transformers", *others)

    def source_of_questions(self) -> dict[str, Any] | None:
        """Which questions of MMLU this machine has, None where none are asked."""
        if not self.questions:
            return None
        subject, most = max(self.subjects.items(), key=lambda one: one[1])
        data = DIRECT.read(most, subject)
        if data is None:
            raise BitassayError(
                f"{self.questions} questions are up to {most} of a subject of MMLU; 5 come with the package",
                "point BITASSAY_DATA at a folder that has mmlu/mmlu_test.jsonl, or --limit 285",
            )
        return {"source": data.source, "digest": data.digest, "whole": data.whole}


@dataclass
class Findings:
    """What the cells of a study found, by variant's name. text: scores by window; facts: what a model stores
    and costs; refused: variants that there are none of here, and why."""

    plan: VariantPlan
    variants: dict[str, Variant]
    text: dict[str, list[TokenScores]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def called(self, name: str) -> str:
        """A variant's name; BASE is the first, whatever the plan calls it."""
        return self.plan.base if name == BASE else name

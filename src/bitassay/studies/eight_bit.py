"""The INT8/FP8 studies (task3.1, task3.2, task3.3): what do 8 bits cost, by format and by granularity?

    study     variants                                                              measured
    task3.1   {INT8, FP8} x {tensor, row, groups of 64 ... 512} x {fake, real}      perplexity, KL, MMLU
    task3.2   {INT8, FP8} x {tensor, row, groups of 128}, fake                      MMLU, speed, products
    task3.3   INT8 and FP8 with inputs rounded per token, plain and smoothed,       perplexity, KL, MMLU
              by torchao and by this package

beside the model in BF16, which is the first variant of each. Source: the experiment document on INT8 and FP8;
`claims.py` holds what it says. *Fake* models hold dequantized weights, *real* ones codes. A group that does
not divide a row is shorter at the row's end, and nothing else changes; `note` says where that is so.

MMLU is asked with 5 examples, by likelihood (`direct`) and by greedy text (`generate`), the same questions of
every variant. `cells.py` says what is measured in one piece, `crew.py` and `cluster.py` who does it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

from bitassay.data.tasks import mmlu_subjects, task_data
from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, nearest
from bitassay.models.load import as_dtype
from bitassay.quantize.recipe import Recipe

SCHEMA = 1
BASE = "bf16"
FORMATS = {"int8": "int8", "fp8": "fp8_e4m3"}
GRANULARITIES = {"tensor": "tensor", "row": "channel", **{f"g{n}": f"g{n}" for n in (64, 128, 256, 512)}}
ALPHA, SAMPLES = 0.5, 16  # SmoothQuant's own exponent; windows of calibration text, of 512 tokens
BLOCK = 4  # windows that the base model reads before the variants do
DEFAULT_PROTOCOL = Protocol(windows=16)
NEW_TOKENS = 16  # of a generated answer; lm-eval reads its first line

Kind = Literal["fake", "real"]


@dataclass(frozen=True)
class Variant:
    """One model of a study. recipe: None for the base model and for torchao's. torchao: quantized by it
    instead, smoothed where `smoothed`."""

    name: str
    format: str | None = None
    granularity: str | None = None
    kind: Kind | None = None
    recipe: Recipe | None = None
    torchao: bool = False
    smoothed: bool = False

    def to_dict(self) -> dict[str, Any]:
        recipe = None if self.recipe is None else self.recipe.model_dump(mode="json")
        return asdict(replace(self, recipe=None)) | {"recipe": recipe}


@dataclass(frozen=True)
class Study:
    """A row of the table above. model, questions: the document's own."""

    name: str
    about: str
    variants: tuple[Variant, ...]
    model: str = "Qwen/Qwen3-1.7B"
    questions: int = 200
    text: bool = True
    speed: bool = False


def weight_only(format: str, granularity: str, kind: Kind) -> Variant:
    name = f"{format}-{granularity}"
    weights = {"format": FORMATS[format], "granularity": GRANULARITIES[granularity]}
    recipe = Recipe.model_validate({"name": name, "weights": weights})
    return Variant(f"{name}-{kind}", format, granularity, kind, recipe)


def both_sides(format: str, smoothed: bool, torchao: bool) -> Variant:
    """Weights with a scale a row, inputs with one a token."""
    name = f"{format}{'-smooth' if smoothed else ''}-{'torchao' if torchao else 'ours'}"
    if torchao:
        return Variant(name, format, "row", "real", torchao=True, smoothed=smoothed)
    parts: dict[str, Any] = {
        "weights": {"format": FORMATS[format], "granularity": "channel", "scale_dtype": "float32"},
        "activations": {"format": FORMATS[format]},
    }
    if smoothed:
        parts["smoothing"] = {"method": "smoothquant", "alpha": ALPHA}
        parts["calibration"] = {"samples": SAMPLES}
    return Variant(name, format, "row", "fake", Recipe(name=name, **parts), smoothed=smoothed)


STUDIES = {
    study.name: study
    for study in (
        Study(
            "task3.1",
            "INT8 and FP8 weights by granularity: perplexity, KL and MMLU, fake and real",
            (
                Variant(BASE),
                *(
                    weight_only(format, granularity, kind)
                    for format in FORMATS
                    for granularity in GRANULARITIES
                    for kind in ("fake", "real")
                ),
            ),
            questions=1000,
        ),
        Study(
            "task3.2",
            "speed of real INT8 and FP8 per row, MMLU of fake ones, errors of products",
            (
                Variant(BASE),
                *(
                    weight_only(format, granularity, "fake")
                    for format in FORMATS
                    for granularity in ("tensor", "row", "g128")
                ),
            ),
            text=False,
            speed=True,
        ),
        Study(
            "task3.3",
            "SmoothQuant INT8 and FP8 with rounded inputs, by torchao and by this package",
            (
                Variant(BASE),
                *(
                    both_sides(format, smoothed, torchao)
                    for torchao in (False, True)
                    for smoothed in (False, True)
                    for format in FORMATS
                ),
            ),
            model="Qwen/Qwen2.5-1.5B-Instruct",
        ),
    )
}


@dataclass(frozen=True)
class EightBitPlan:
    """What is asked of a study. questions: of MMLU in all, spread over its subjects. Raises BitassayError for
    what makes no sense."""

    study: str
    model: str
    questions: int
    protocol: Protocol = DEFAULT_PROTOCOL
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        find_study(self.study)
        if self.questions < 1:
            raise BitassayError(f"{self.questions} questions leave nothing to measure", "--limit 1 or more")

    @property
    def variants(self) -> tuple[Variant, ...]:
        return find_study(self.study).variants

    @property
    def blocks(self) -> list[range]:
        """Which windows are read together."""
        if not find_study(self.study).text:
            return []
        assert self.protocol.windows is not None
        count = self.protocol.windows
        return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

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
        return asdict(self) | {"protocol": self.protocol.id}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "EightBitPlan":
        """From `to_dict`."""
        return cls(**{**content, "protocol": Protocol.parse(content["protocol"])})

    def described(self, digest: str) -> dict[str, Any]:
        """What a run folder belongs to; `digest` is that of the model's weights. Raises BitassayError where
        the questions are not on this machine."""
        subject, most = max(self.subjects.items(), key=lambda one: one[1])
        data = task_data("mmlu", most, subject)
        if data is None:
            raise BitassayError(
                f"{self.questions} questions are up to {most} of a subject of MMLU; 5 come with the package",
                "point BITASSAY_DATA at a folder that has mmlu/mmlu_test.jsonl, or --limit 285",
            )
        packages = ("bitassay", "torch", "transformers", "lm-eval")
        return {
            "kind": "eight-bit",
            "schema": SCHEMA,
            "plan": self.to_dict(),
            "variants": [variant.to_dict() for variant in self.variants],
            "weights_digest": digest,
            "questions": {"source": data.source, "digest": data.digest, "whole": data.whole},
            "versions": {name: version(name) for name in packages},
        }


def find_study(name: str) -> Study:
    if name not in STUDIES:
        raise BitassayError(f"no INT8/FP8 study is called {name!r}; the nearest are {nearest(name, STUDIES)}")
    return STUDIES[name]

"""Specs of what solves for codes: gptq, low_rank, learned, mixed, tune. The algorithms are `solvers/`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.spec import RecipePart, SolverPart, validate_as
from bitassay.quantization.recipe.weights import SUMS, WeightScheme

if TYPE_CHECKING:
    from bitassay.quantization.recipe.recipe import Recipe


class Mixed(RecipePart):
    """bits: the average of stored bits a weight, at most. formats: what a matrix may have, each a format's
    name or some fields of a scheme; the recipe's `weights` has the rest. sensitivity: what is added up, the
    measured divergence (`kl`) or the one that output errors predict (`error`). samples: how many windows of
    the calibration text it is measured on."""

    bits: float = Field(gt=0, le=16)
    formats: tuple[str | dict[str, Any], ...] = Field(default=("int2", "int3", "int4"), min_length=2)
    sensitivity: Literal["kl", "error"] = "error"
    samples: int = Field(default=8, ge=1)

    def contradictions(self) -> Iterator[str]:
        if any(choice in self.formats[:place] for place, choice in enumerate(self.formats)):
            yield "formats lists the same choice twice"

    @property
    def needs_text(self) -> bool:
        return True

    @property
    def measures_bits(self) -> bool:
        return True

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        if recipe.weights is None:
            yield "its formats are variants of weights, of which there are none"
        else:
            self.choices(recipe.weights)

    def choices(self, weights: WeightScheme) -> list[WeightScheme]:
        """Return the schemes to choose from. Raises ValueError where one makes no sense."""
        usual = WeightScheme.model_validate({"format": weights.format})
        rest = weights.model_dump()
        # Each format has its own defaults, and llama.cpp's own types leave no choice.
        fixed = ("scale", "scale_dtype") if weights.number_format.fixed_group is None else tuple(rest)
        for key in fixed:
            if rest[key] == getattr(usual, key):
                del rest[key]
        changes = [{"format": choice} if isinstance(choice, str) else choice for choice in self.formats]
        return [
            validate_as(WeightScheme, fields if _is_fixed(fields) else rest | fields) for fields in changes
        ]


def _is_fixed(fields: dict[str, Any]) -> bool:
    name = fields.get("format", "")
    return name in FORMATS and FORMATS[name].fixed_group is not None


class Gptq(SolverPart):
    """How GPTQ is run; the header of `gptq.py` says what the fields mean."""

    order: Literal["activation", "natural"] = "activation"
    damping: float = Field(default=0.01, gt=0, le=1)
    planes: Literal["apart"] | None = None

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        yield from super().conflicts(recipe)
        plan = recipe.replication
        if self.planes is not None and (plan is None or not plan.makes_codes or plan.differ != "residual"):
            yield "planes: apart is of residual codes, and there are none"

    def conflicts_of_copies(self, recipe: "Recipe", solved: Sequence[str] = SUMS) -> Iterator[str]:
        yield from super().conflicts_of_copies(recipe, solved)


class LowRankSpec(SolverPart):
    """Rank and dtype of the factors, and how often weights are rounded without what the factors hold."""

    rank: int = Field(ge=0, le=65536)
    dtype: Literal["float16", "bfloat16"] = "float16"
    rounds: int = Field(default=1, ge=1, le=100)

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        yield from self.conflicts_of_copies(recipe)

    def stored_bits(self, out: int, columns: int) -> int:
        return 16 * self.rank * (out + columns)


class _Moving(SolverPart):
    """Training that moves codes and scales, by Adam. steps of `batch` samples. Learning rates: `codes` in
    steps of the grid, `scales` relative to their first value; zero leaves that kind as it is."""

    steps: int = Field(default=50, ge=1)
    batch: int = Field(default=4, ge=1)

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        yield from super().conflicts(recipe)
        if any(scheme.number_format.kind == "float" for scheme in recipe.schemes):
            yield "moves codes by steps, and FP8 codes have no common step"
        if any(scheme.has_planes for scheme in recipe.schemes):
            yield "moves codes along a grid, and binary planes lie on none"
        if any(scheme.granularity == "tensor" for scheme in recipe.schemes):
            yield "needs a scale for each row or group"

    def text_passes(self, samples: int) -> int:
        return 4 * self.steps * self.batch


class Learned(_Moving):
    """Each layer is trained to give the unquantized layer's output."""

    codes: float = Field(default=1e-2, ge=0)
    scales: float = Field(default=5e-3, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    seed: int = 0


class Tune(_Moving):
    """All layers are trained together. generated: samples that the base model writes. norms: their rate."""

    steps: int = Field(default=128, ge=1)
    generated: int = Field(default=0, ge=0)
    codes: float = Field(default=2e-3, ge=0)
    scales: float = Field(default=1e-3, ge=0)
    norms: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    seed: int = 0

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        yield from super().conflicts(recipe)
        if not any((self.codes, self.scales, self.norms)):
            yield "all learning rates are zero"

    def text_passes(self, samples: int) -> int:
        return super().text_passes(samples) + samples

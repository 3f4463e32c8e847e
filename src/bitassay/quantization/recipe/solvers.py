"""Specs of what solves for codes: gptq, low_rank, learned, mixed, tune. The algorithms are `solvers/`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from bitassay.quantization.recipe.spec import Spec
from bitassay.quantization.recipe.weights import WeightScheme


class Gptq(Spec):
    """How GPTQ is run; the header of `gptq.py` says what the fields mean."""

    order: Literal["activation", "natural"] = "activation"
    damping: float = Field(default=0.01, gt=0, le=1)
    planes: Literal["apart"] | None = None


class LowRankSpec(Spec):
    """The rank of every matrix's correction, the dtype of its factors, and how often the weights are rounded
    again without what the factors hold (`rounds`: 1 rounds once)."""

    rank: int = Field(ge=0, le=65536)
    dtype: Literal["float16", "bfloat16"] = "float16"
    rounds: int = Field(default=1, ge=1, le=100)

    def bits(self, out: int, columns: int) -> int:
        """What the factors of such a matrix store."""
        return 16 * self.rank * (out + columns)


class Learned(Spec):
    """steps of `batch` calibration samples for each layer. Learning rates: `codes` in steps of the grid,
    `scales` relative to their first value; zero leaves that kind as it is."""

    steps: int = Field(default=50, ge=1)
    batch: int = Field(default=4, ge=1)
    codes: float = Field(default=1e-2, ge=0)
    scales: float = Field(default=5e-3, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    seed: int = 0


class Mixed(Spec):
    """bits: the average of stored bits a weight, at most. formats: what a matrix may have, each a format's
    name or some fields of a scheme; the recipe's `weights` has the rest. sensitivity: what is added up, the
    measured divergence (`kl`) or the one that output errors predict (`error`). samples: how many windows of
    the calibration text it is measured on."""

    bits: float = Field(gt=0, le=16)
    formats: tuple[str | dict[str, Any], ...] = Field(default=("int2", "int3", "int4"), min_length=2)
    sensitivity: Literal["kl", "error"] = "error"
    samples: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _different(self) -> "Mixed":
        if any(one == other for place, one in enumerate(self.formats) for other in self.formats[:place]):
            raise ValueError("formats lists the same choice twice")
        return self

    def choices(self, weights: WeightScheme) -> list[WeightScheme]:
        """The schemes to choose from. Raises ValueError where one makes no sense."""
        usual = WeightScheme.model_validate({"format": weights.format})
        rest = weights.model_dump()
        for key in ("scale", "scale_dtype"):  # each format has its own defaults
            if rest[key] == getattr(usual, key):
                del rest[key]
        given = [{"format": choice} if isinstance(choice, str) else choice for choice in self.formats]
        return [WeightScheme.model_validate(rest | fields) for fields in given]


class Tune(Spec):
    """steps of `batch` samples each: of the calibration samples and as many more that the base model writes
    as `generated` says. Learning rates: `codes` in steps of the grid, `scales` relative to their first value,
    `norms` absolute; zero leaves that kind as it is."""

    steps: int = Field(default=128, ge=1)
    batch: int = Field(default=4, ge=1)
    generated: int = Field(default=0, ge=0)
    codes: float = Field(default=2e-3, ge=0)
    scales: float = Field(default=1e-3, ge=0)
    norms: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    seed: int = 0

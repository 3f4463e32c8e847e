"""Specs of what is rounded besides weights: inputs of linears, KV cache. Algorithms: `inputs/`."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from bitassay.quantization.recipe.formats import FORMATS, INPUT_FORMATS, NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.spec import RecipePart, Spec, one_of, option
from bitassay.quantization.recipe.weights import WeightScheme

if TYPE_CHECKING:
    from bitassay.quantization.recipe.recipe import Recipe


class OutlierColumns(Spec):
    """Which columns stay in 16 bits: exactly one of the two rules."""

    sigma: float | None = Field(default=None, gt=0)
    percentile: float | None = Field(default=None, gt=0, lt=100)

    def contradictions(self) -> Iterator[str]:
        if (self.sigma is None) == (self.percentile is None):
            yield "give sigma or percentile, such as {sigma: 6}"


class InputScheme(Spec):
    """How the input of one linear is rounded."""

    format: Annotated[str, one_of(INPUT_FORMATS, "input format")] = "int8"
    symmetric: bool = True
    scale: Literal["dynamic", "absmax", "percentile", "moving_average", "kl", "learned"] = "dynamic"
    percentile: float = Field(default=99.9, ge=50, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    outliers: OutlierColumns | None = None
    scale_factor: float = option(1.0, ge=0.1, le=4)

    @property
    def number_format(self) -> NumberFormat:
        return INPUT_FORMATS[self.format]

    @property
    def needs_calibration(self) -> bool:
        """Whether the scale or the outlier columns come from calibration text."""
        return self.scale != "dynamic" or self.outliers is not None

    def contradictions(self) -> Iterator[str]:
        fmt = self.number_format
        if not self.symmetric and fmt.kind == "float":
            yield f"{self.format} codes are symmetric around zero: a zero point cannot shift them"
        if not self.symmetric and self.scale in ("kl", "learned"):
            yield f"scale: {self.scale} finds one threshold for both signs: use symmetric: true"
        if self.scale == "kl" and (fmt.kind == "float" or fmt.bits > 8):
            yield f"scale: kl compares histograms of at most 256 equal steps, not {self.format}"
        rules = {"percentile": "percentile", "momentum": "moving_average"}
        idle = [name for name, rule in rules.items() if self.scale != rule]
        yield from self.idle(idle, f"scale: {self.scale}")


class InputOverride(Spec):
    """Another scheme, or none, for the inputs of the linears whose full name matches the glob `match`."""

    match: str
    inputs: InputScheme | None


class Activations(InputScheme, RecipePart):
    """The scheme of every linear's input in the decoder layers; the first override that matches wins."""

    overrides: tuple[InputOverride, ...] = ()

    def override_for(self, module: str) -> InputOverride | None:
        """Return the first override whose pattern matches."""
        return next((o for o in self.overrides if fnmatchcase(module, o.match)), None)

    def scheme_for(self, module: str) -> InputScheme | None:
        """Return the scheme of the linear of that full name; None: its input stays as it is."""
        override = self.override_for(module)
        return self if override is None else override.inputs

    @property
    def schemes(self) -> list[InputScheme]:
        """All schemes that inputs may have."""
        return [self, *(o.inputs for o in self.overrides if o.inputs is not None)]

    @property
    def needs_text(self) -> bool:
        return any(scheme.needs_calibration for scheme in self.schemes)

    @property
    def has_steps(self) -> bool:
        """Whether all inputs are rounded to integers, whose grid can be moved by a share of a step."""
        return all(scheme.number_format.kind == "integer" for scheme in self.schemes)

    @property
    def plain_obstacle(self) -> str | None:
        return "engines round inputs by their own steps"

    def changes_codes(self, recipe: "Recipe") -> bool:
        return recipe.smoothing is not None and recipe.smoothing.method == "smoothquant"

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        if not all(has_product(inputs, weights) for inputs in self.schemes for weights in recipe.schemes):
            yield "no device multiplies integer inputs with FP8 weights"


def has_product(inputs: InputScheme, weights: WeightScheme) -> bool:
    """Return whether some device multiplies the two: integer inputs and FP8 weights no device does."""
    return inputs.number_format.kind == "float" or weights.number_format.kind != "float"


class KvCache(RecipePart):
    """How keys and values are stored. granularity: `head`, a scale for a head's vector, or groups of it."""

    format: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"] = "int8"
    granularity: str = "head"
    symmetric: bool = True
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"

    @field_validator("granularity")
    @classmethod
    def _known_granularity(cls, text: str) -> str:
        if text != "head" and Granularity.parse(text).group_size is None:
            raise ValueError(f"granularity of a cache: head, or groups such as g32, not {text!r}")
        return text

    def contradictions(self) -> Iterator[str]:
        if not self.symmetric and not self.number_format.has_asymmetric:
            yield f"{self.format} codes are symmetric around zero: a zero point cannot shift them"

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    @property
    def label(self) -> str:
        """What is stored, such as int4/g32/asymmetric/bfloat16."""
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.format}/{self.granularity}/{symmetry}/{self.scale_dtype}"

    @property
    def groups(self) -> Granularity:
        """The granularity of vectors as the rows of a matrix."""
        return Granularity.parse("channel" if self.granularity == "head" else self.granularity)

    @property
    def plain_obstacle(self) -> str | None:
        return "plain transformers would run the model without"

    def changes_codes(self, recipe: "Recipe") -> bool:
        return False

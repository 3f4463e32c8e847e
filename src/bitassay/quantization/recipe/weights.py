"""A scheme: how one matrix is stored, as a recipe says it."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from bitassay.quantization.recipe.formats import FORMATS, NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.spec import Spec, one_of, option, validate_as

SUMS = ("residual", "digits")  # each copy but the first repairs what those before it left over

NOT_OF_FIXED = ("zero_point", "offset", "scale_factor", "turned", "restricted", "copies")


def fixed_by(fmt: NumberFormat) -> dict[str, Any]:
    """Return the fields of a scheme that a type of llama.cpp leaves no choice of: one with two levels of
    scales, or a table."""
    assert fmt.fixed_group is not None
    return {
        "granularity": f"g{fmt.fixed_group}",
        "symmetric": fmt.levels is None or not fmt.levels.minima,
        "scale": "mse",
        "scale_dtype": "float16",
    }


class Copies(Spec):
    """Several quantized copies of one matrix instead of one: `W' = sum_i c_i W'_i` (`copies.py`).

    differ: what sets them apart. values: a scale factor, percentile, offset or level of noise for each copy;
    offsets are i/n by default; of residual codes, scale factors, 1 by default. coefficients: the c_i, 1/n by
    default, and 1 for residual codes and digits. seed: the first one's; each further copy's is one more.
    """

    count: int = Field(ge=2, le=16)
    differ: Literal["scale", "clip", "offset", "noise", "seed", "rotation", "residual", "digits"]
    values: tuple[float, ...] = ()
    coefficients: tuple[float, ...] | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)

    def contradictions(self) -> Iterator[str]:
        needs_values = self.differ in ("scale", "clip", "noise")
        if self.values and not needs_values and self.differ not in ("offset", "residual"):
            yield f"values: copies that differ by {self.differ} have none"
        if (needs_values or self.values) and len(self.values) != self.count:
            yield f"values: {self.count} copies that differ by {self.differ} need as many"
        if self.coefficients is not None and self.is_sum:
            yield "coefficients: residual codes and digits are summed as they are"
        if self.coefficients is not None and len(self.coefficients) != self.count:
            yield f"coefficients: {self.count} copies need as many"

    @property
    def is_sum(self) -> bool:
        """Whether each copy but the first repairs what those before it left over."""
        return self.differ in SUMS

    @property
    def shares(self) -> tuple[float, ...]:
        """The coefficients c_i."""
        usual = 1.0 if self.is_sum else 1 / self.count
        return self.coefficients or (usual,) * self.count

    def scheme(self, scheme: "WeightScheme", copy: int) -> "WeightScheme":
        """Return the scheme of one copy. Raises ValueError where it makes no sense."""
        value = self.values[copy] if self.values else copy / self.count
        change: dict[str, Any] = {
            "scale": {"scale_factor": value},
            "clip": {"scale": "percentile", "percentile": value},
            "offset": {"offset": value},
            "noise": {"noise": value} | ({"seed": self.seed + copy} if value else {}),
            "seed": {"rounding": "stochastic", "seed": self.seed + copy},
            "rotation": {"turned": self.seed + copy},
            "residual": {"scale_factor": value} if self.values else {},
            "digits": {},
        }[self.differ]
        return validate_as(WeightScheme, scheme.model_dump(exclude={"copies"}) | change)

    def schemes(self, scheme: "WeightScheme") -> list["WeightScheme"]:
        """Return the scheme of each copy."""
        return [self.scheme(scheme, copy) for copy in range(self.count)]

    def whole(self, scheme: "WeightScheme") -> "WeightScheme":
        """Return the scheme of the one grid whose codes' digits the copies are."""
        bits = int(scheme.number_format.bits) * self.count
        return validate_as(WeightScheme, scheme.model_dump(exclude={"copies"}) | {"format": f"int{bits}"})


class WeightScheme(Spec):
    """How one matrix is quantized; docs/formats.md says what every option does.

    scale: mse by default below 4 bits, absmax from there on. scale_dtype: float16 by default, bfloat16 for
    FP8, whose scales, absmax over 448 or 57344, float16 would hold as subnormal numbers of few bits. offset:
    stored nowhere. turned: the seed of a random Hadamard rotation of the inputs, before rounding and back
    after it.
    """

    format: Annotated[str, one_of(FORMATS, "format")]
    granularity: Annotated[str, AfterValidator(lambda text: Granularity.parse(text).name)] = "channel"
    symmetric: bool = True
    restricted: bool = option(False)
    scale: Literal["absmax", "mse", "percentile"] = "absmax"
    percentile: float = option(99.9, gt=50, le=100)
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    zero_point: Literal["integer", "searched", "mirrored", "middle", "free", "minimum"] = option("integer")
    offset: float = option(0.0, ge=0, lt=1)
    scale_factor: float = option(1.0, ge=0.1, le=4)
    turned: int | None = option(None, ge=0, lt=2**63)
    rounding: Literal["nearest", "stochastic", "feedback"] = option("nearest")
    noise: float = option(0.0, ge=0, le=1)
    seed: int = option(0, ge=0, lt=2**63)
    residual: float = option(0.0, ge=0, le=1)
    column_scales: bool = option(False)
    copies: Copies | None = option(None)

    def residual_columns(self, columns: int) -> int:
        """Return how many of a matrix's columns have a second plane."""
        return math.ceil(self.residual * columns)

    @property
    def has_planes(self) -> bool:
        """Whether it takes `binary.py` to make it."""
        return self.residual > 0 or self.column_scales

    @property
    def uses_importance(self) -> bool:
        """Whether it rounds a matrix differently once it knows the inputs."""
        searched = self.scale == "mse" or not Granularity.parse(self.granularity).is_settled
        return searched or self.has_planes or self.copies is not None

    @property
    def whole_zero_points(self) -> bool:
        """Whether zero points, if there are any, are whole steps."""
        return self.zero_point in ("integer", "searched", "mirrored")

    @property
    def residual_scheme(self) -> "WeightScheme":
        """How the second plane, its columns side by side, is stored."""
        sizes = Granularity.parse(self.granularity).block_sizes
        granularity = self.granularity if sizes is None else f"g{sizes[1]}"
        return WeightScheme(format=self.format, granularity=granularity, scale_dtype=self.scale_dtype)

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    def with_copies(self, copies: Copies) -> "WeightScheme":
        """Return the scheme of several such matrices. Raises ValueError where it cannot have such copies."""
        return validate_as(WeightScheme, self.model_dump() | {"copies": copies})

    def with_granularity(self, granularity: str) -> "WeightScheme":
        """Return the same scheme with another granularity."""
        return self.model_copy(update={"granularity": granularity})

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_format(cls, fields: Any) -> Any:
        name = fields.get("format") if isinstance(fields, dict) else None
        if not isinstance(name, str) or name not in FORMATS:
            return fields
        fmt = FORMATS[name]
        if fmt.fixed_group is not None:
            return fixed_by(fmt) | fields
        scale = "mse" if fmt.bits < 4 else "absmax"
        return {"scale": scale, "scale_dtype": "bfloat16" if fmt.kind == "float" else "float16", **fields}

    def contradictions(self) -> Iterator[str]:
        fmt, fields = self.number_format, self.model_fields_set
        random = self.rounding == "stochastic" or self.noise > 0
        nearest = self.rounding == "nearest" and self.noise == 0
        if fmt.fixed_group is not None:
            yield from self._contradictions_of_fixed_types()
        if not self.symmetric and not fmt.has_asymmetric:
            yield f"{self.format} codes are symmetric around zero: a zero point cannot shift them"
        if fmt.kind == "binary" and self.scale != "mse":
            yield f"binary has no code for zero, so scale: {self.scale} would only add error: use scale: mse"
        if "percentile" in fields and self.scale != "percentile":
            yield f"percentile says where scale: percentile clips; scale: {self.scale} does not use it"
        if self.restricted and (fmt.kind != "integer" or not self.symmetric):
            yield ("restricted leaves out the lowest code of symmetric integers; no others have one to spare")
        if self.zero_point != "integer" and (fmt.kind != "integer" or self.symmetric):
            yield f"zero_point: {self.zero_point} needs zero points: an integer format with symmetric: false"
        if self.zero_point in ("searched", "mirrored", "middle", "minimum") and self.scale != "mse":
            yield f"zero_point: {self.zero_point} is what leaves the least squared error: use scale: mse"
        if self.offset > 0 and fmt.kind != "integer":
            yield f"offset shifts a grid of integers, not of {self.format}"
        if self.offset > 0 and (self.restricted or not self.whole_zero_points):
            yield (
                "an offset adds nothing to zero points in parts of a step, and takes back the symmetry of a "
                "restricted range"
            )
        if not nearest and fmt.kind == "float":
            yield f"{self.format} is rounded to nearest by torch's cast, and has no step to measure noise in"
        if not nearest and fmt.kind == "table":
            yield f"{self.format} is rounded to nearest: its codes have no common step"
        if self.has_planes and fmt.kind != "binary":
            yield f"{self.format} has codes enough for one plane; residual and column_scales are of binary"
        if self.has_planes and not nearest:
            yield "binary planes and column scales are fitted to each other by rounding to nearest"
        if "seed" in fields and not random:
            yield "seed is of stochastic rounding and of noise; there is neither"
        if self.turned is not None and self.has_planes:
            yield "turned: column scales and planes of columns are of columns as they are"
        if self.copies is not None:
            yield from self._contradictions_of_copies(self.copies)
            self.copies.schemes(self)

    def _contradictions_of_fixed_types(self) -> Iterator[str]:
        fixed = fixed_by(self.number_format)
        if changed := [key for key, value in fixed.items() if getattr(self, key) != value]:
            said = ", ".join(f"{key}: {fixed[key]}" for key in changed)
            yield f"{self.format} is a type of llama.cpp with its own scales ({said}): leave {changed[0]} out"
        plain = {key: type(self).model_fields[key].default for key in NOT_OF_FIXED}
        if changed := [key for key, value in plain.items() if getattr(self, key) != value]:
            yield f"{self.format} has no {', '.join(changed)}: it holds codes and its own scales alone"

    def _contradictions_of_copies(self, copies: Copies) -> Iterator[str]:
        fmt = self.number_format
        mid_rise = (self.symmetric, self.restricted, self.offset) == (True, False, 0.5)
        nearest = self.rounding == "nearest" and self.noise == 0
        if copies.differ == "digits" and (
            fmt.kind != "integer"
            or not mid_rise
            or not nearest
            or f"int{int(fmt.bits) * copies.count}" not in FORMATS
        ):
            yield (
                "copies: digits are of symmetric integers with offset: 0.5, rounded to nearest, on a grid of "
                "as many bits as all copies have: 2 of int2 or int4, 4 of int2"
            )
        if copies.differ == "offset" and self.scale == "percentile":
            yield "copies: offset grids share one scale: scale: mse or absmax"
        if copies.differ == "offset" and (self.offset > 0 or self.scale_factor != 1):
            yield "copies: offset grids have offsets of their own, and one scale that is theirs"
        if self.zero_point == "minimum":
            yield "copies: a minimum is of llama.cpp's types, which hold one matrix: another zero_point"
        if self.has_planes:
            yield "copies: binary planes are copies already: residual: 1 has two"

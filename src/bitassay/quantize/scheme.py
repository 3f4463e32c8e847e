"""A scheme: how one matrix is stored, as a recipe says it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from bitassay.errors import nearest
from bitassay.quantize.formats import FORMATS
from bitassay.quantize.granularity import Granularity


class Part(BaseModel):
    """A part of a recipe: frozen, and it refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightScheme(Part):
    """How one matrix is quantized to nearest.

    `scale` defaults to mse below 4 bits and absmax from there on. `scale_dtype` defaults to float16, for FP8
    to bfloat16: an FP8 scale is absmax over 448 or 57344, so small that float16 would hold it as a subnormal
    number of few bits.
    """

    format: str
    granularity: str = "channel"
    symmetric: bool = True
    scale: Literal["absmax", "mse"] = "absmax"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_format(cls, given: Any) -> Any:
        fmt = (
            FORMATS.get(given["format"])
            if isinstance(given, dict) and isinstance(given.get("format"), str)
            else None
        )
        if fmt is None:
            return given
        scale = "mse" if fmt.bits < 4 else "absmax"
        return {"scale": scale, "scale_dtype": "bfloat16" if fmt.kind == "float" else "float16", **given}

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; the nearest are {nearest(name, FORMATS)}")
        return name

    @field_validator("granularity")
    @classmethod
    def _known_granularity(cls, text: str) -> str:
        return Granularity.parse(text).name

    @model_validator(mode="after")
    def _makes_sense(self) -> "WeightScheme":
        fmt = FORMATS[self.format]
        if not self.symmetric and not fmt.has_asymmetric:
            raise ValueError(f"{self.format} codes are symmetric around zero: a zero point cannot shift them")
        if fmt.kind == "binary" and self.scale == "absmax":
            raise ValueError(
                "binary has no code for zero, so an absmax scale would only add error: use scale: mse"
            )
        return self

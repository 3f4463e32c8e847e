"""Kinds of parameters that several verbs share. What a value can be is said here, so that a wrong one is
refused before anything is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from cyclopts.validators import Number


def _whole(_: Any, tokens: Sequence[Token]) -> Any:
    """A number as it is written: left alone, cyclopts takes 1.5 for 1."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


Names = Annotated[list[str], Parameter(consume_multiple=True, negative=())]
Numbers = Annotated[list[int], Parameter(consume_multiple=True, negative=())]
Counts = Annotated[list[int], Parameter(consume_multiple=True, negative=(), validator=Number(gte=1))]
Count = Annotated[int, Parameter(validator=Number(gte=1), converter=_whole)]
CountOrNone = Annotated[int, Parameter(validator=Number(gte=0), converter=_whole)]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63), converter=_whole)]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
StateDtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["fp16", "bf16", "fp32"]


def _is_share(_: Any, value: float | None) -> None:
    if value is not None and not 0 < value < 1:  # not a number is none either
        raise ValueError("Must be between 0 and 1.")


Share = Annotated[float, Parameter(validator=_is_share)]


def _is_device(_: Any, text: str | None) -> None:
    if text is not None and not re.fullmatch(r"[a-z]+(:\d+)?", text):
        raise ValueError("A device is cpu, cuda, cuda:1 or mps.")


Device = Annotated[str, Parameter(validator=_is_device)]


@dataclass(frozen=True)
class _Revision:
    revision: str | None = None
    """Of a model on the Hugging Face hub: a branch, tag or commit. MODEL@REVISION says the same, for any
    model."""

    def of(self, model: str) -> str:
        """`model` with the revision."""
        return model if self.revision is None else f"{model}@{self.revision}"


@Parameter(name="*")
@dataclass(frozen=True)
class Revision(_Revision):
    """Which version of MODEL is meant."""


@Parameter(name="*")
@dataclass(frozen=True)
class Loading(_Revision):
    """How MODEL is found and loaded."""

    attention: str = "auto"
    """Attention of transformers: auto (sdpa, or what the model has instead), sdpa, eager or another."""
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False
    """Run code that comes with the model."""

    @property
    def options(self) -> dict[str, Any]:
        """What `bitassay.load` takes. Raises BitassayError for an attention that nobody knows."""
        from bitassay.models.options import as_attention

        as_attention(self.attention)
        return {"attention": self.attention, "trust_remote_code": self.trust_remote_code}


AS_IT_IS, NEWEST = Loading(), Revision()

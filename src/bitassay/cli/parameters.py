"""Kinds of parameters that several verbs share."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

Names = Annotated[list[str], Parameter(consume_multiple=True, negative=())]
Numbers = Annotated[list[int], Parameter(consume_multiple=True, negative=())]


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
        """What `bitassay.load` takes."""
        return {"attention": self.attention, "trust_remote_code": self.trust_remote_code}


AS_IT_IS, NEWEST = Loading(), Revision()

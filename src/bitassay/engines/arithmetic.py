"""In which arithmetic a model runs, and where: what the plans of runs have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from bitassay.engines.load import load
from bitassay.models.options import AUTO

Plan = TypeVar("Plan", bound="Arithmetic")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """dtype, device and attention are those of `load`."""

    dtype: str = "float32"
    device: str = "cpu"
    attention: str = AUTO

    def loaded(self, model: str | Path, **options: Any) -> PreTrainedModel:
        """Return `model` in this arithmetic. options: further keywords of `load`, or other values of these
        three. Raises as `load` does."""
        arithmetic: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "attention": self.attention}
        return load(model, **arithmetic | options)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")

    @classmethod
    def of(cls: type[Plan], content: Mapping[str, Any]) -> Plan:
        """Return the plan that gave `to_dict`, from a dictionary with it."""
        return TypeAdapter(cls).validate_python({field.name: content[field.name] for field in fields(cls)})

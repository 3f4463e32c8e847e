"""What is wrong with a file of fields, in words for its author.
The sentences that pydantic has are for programmers."""

from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from bitassay.errors import suggestion

MOST = 5  # defects that are named
_PLAIN = {"dict_type": "not an object", "model_type": "not an object", "string_type": "not a text"}


class Fields(BaseModel):
    """Frozen fields of a file; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StrictFields(Fields):
    """The same, without any conversion of types."""

    model_config = ConfigDict(strict=True)


def defects(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return the defects that validating something as `kind` found, each with its place; of an unknown field
    also the nearest known ones."""
    every = error.errors(include_url=False)
    messages = list(dict.fromkeys(_defect(dict(details), kind) for details in every))
    more = f"; and {len(messages) - MOST} more" if len(messages) > MOST else ""
    return "; ".join(messages[:MOST]) + more


def _defect(details: dict[str, Any], kind: type[BaseModel]) -> str:
    location = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        within = ".".join(location[:-1])
        known = {name for model in _models_at(kind, details["loc"][:-1]) for name in model.model_fields}
        advice = suggestion(location[-1], known) if known else ""
        return f"{within + ': ' if within else ''}there is no field {location[-1]!r}" + (
            f"; {advice}" if advice else ""
        )
    if details["type"] == "missing":
        return f"{'.'.join(location)} is missing"
    message = _PLAIN.get(details["type"]) or details["msg"].removeprefix("Value error, ")
    value = details.get("input")
    is_shown = isinstance(value, (str, int, float, bool)) and repr(value) not in message
    shown = f" (it is {value!r:.60})" if is_shown else ""
    return f"{'.'.join(location)}: {message[:1].lower()}{message[1:]}{shown}" if location else message


def _models_at(kind: type[BaseModel], location: Iterable[str | int]) -> list[type[BaseModel]]:
    """The models that may stand at a place of `kind`. Names of union members, which pydantic puts into a
    place, are passed over."""
    here: list[type[BaseModel]] = [kind]
    for part in location:
        fields = [model.model_fields[part] for model in here if part in model.model_fields]
        if fields:
            here = [model for field in fields for model in _models_in(field.annotation)]
        elif named := [model for model in here if model.__name__ == part]:
            here = named
    return here


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple, list, dict):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []

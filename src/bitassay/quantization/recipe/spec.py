"""What all specs of a recipe have in common: frozen fields that are validated, and written out again."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Spec(BaseModel):
    """A part of a recipe: frozen, and it refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_yaml_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without those that are None by default: `model_validate` makes
        an equal spec of them."""
        return _without_absent(self, self.model_dump(mode="json"))


def _without_absent(spec: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if value is None and field.default is None:
            dumped.pop(name, None)
        elif isinstance(value, BaseModel):
            _without_absent(value, dumped[name])
        elif isinstance(value, tuple):
            for item, inner in zip(value, dumped[name], strict=True):
                if isinstance(item, BaseModel):
                    _without_absent(item, inner)
    return dumped


S = TypeVar("S", bound=Spec)


def validate_as(kind: type[S], fields: dict[str, Any]) -> S:
    """Return a spec that another one asks for. Raises ValueError with the first reason alone: inside a
    validator a ValidationError would print all of itself."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

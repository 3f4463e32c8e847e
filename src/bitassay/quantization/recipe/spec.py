"""What the specs of a recipe have in common: frozen fields that are validated, and written out again.

A `RecipePart` also says what it needs and which combinations make no sense. What a part *does* is registered
under its name where the algorithms are: `PREPARE` and `FINISH` of `pipeline.py`, `SOLVERS` of
`solvers/registry.py`, `ATTACH` of `runtime/model.py`, `EXPRESSED`, `ADDED_PARAMETERS`, `MEMORY` and
`OPENED_MEMORY` of `export/`, `WORK_BYTES` of `studies/checkpoint.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import suggestion

if TYPE_CHECKING:
    from bitassay.quantization.recipe.recipe import Recipe


def option(default: Any, **limits: Any) -> Any:
    """Return a field that is not written out at its default: recipes keep their ids when options come."""
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


def one_of(names: Mapping[str, Any], what: str) -> AfterValidator:
    """Return the check that a text is a key of `names`, which may grow by plug-ins; `what` it names."""

    def known(name: str) -> str:
        if name not in names:
            raise ValueError(f"unknown {what} {name!r}; {suggestion(name, names, short=30)}")
        return name

    return AfterValidator(known)


class Spec(BaseModel):
    """Frozen fields; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_yaml_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values that `model_validate` reads, without idle ones that are None."""
        return _without_absent(self, self.model_dump(mode="json"))

    def contradictions(self) -> Iterator[str]:
        """Yield the reasons why the combination of fields makes no sense; the first is raised."""
        yield from ()

    @model_validator(mode="after")
    def _makes_sense(self) -> "Spec":
        if reason := next(self.contradictions(), None):
            raise ValueError(reason)
        return self

    def idle(self, names: Sequence[str], where: str) -> Iterator[str]:
        """Yield the fields that are not at their defaults although they have no effect."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                yield f"{name} has no effect on {where}"


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


def validate_as(kind: type[S], fields: Any) -> S:
    """Return a spec that another one asks for. Raises ValueError with the first reason alone."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


class RecipePart(Spec):
    """Something that a recipe does besides rounding weights to nearest."""

    @property
    def needs_text(self) -> bool:
        """Whether the result depends on calibration text."""
        return False

    @property
    def solves(self) -> bool:
        """Whether codes are more than weights rounded to nearest."""
        return False

    @property
    def measures_bits(self) -> bool:
        """Whether it takes a measurement to know how many bits are stored."""
        return False

    @property
    def plain_obstacle(self) -> str | None:
        """What plain transformers would not do with the weights of such a model; None: nothing is missing."""
        return None

    def changes_codes(self, recipe: "Recipe") -> bool:
        """Return whether the recipe without this part would have other codes."""
        return True

    def stored_bits(self, out: int, columns: int) -> int:
        """Return how many bits the part stores beside the codes of a matrix `[out, columns]`."""
        return 0

    def text_passes(self, samples: int) -> int:
        """Return about how many forward passes over one calibration sample the part takes."""
        return 0

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        """Yield the reasons why the part makes no sense in the recipe."""
        yield from ()


class SolverPart(RecipePart):
    """A part that decides codes by calibration text; the base class of the specs of plug-in solvers."""

    @property
    def needs_text(self) -> bool:
        return True

    @property
    def solves(self) -> bool:
        return True

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        if not recipe.schemes:
            yield "there are no weights to round"
        if any(scheme.rounding != "nearest" or scheme.noise for scheme in recipe.schemes):
            yield "decides what is rounded where, so rounding and noise have no say"
        yield from self.conflicts_of_copies(recipe)

    def conflicts_of_copies(self, recipe: "Recipe", solved: Sequence[str] = ()) -> Iterator[str]:
        """Yield the reasons of rotated matrices and of copies but those that the part can solve."""
        if any(scheme.turned is not None for scheme in recipe.schemes):
            yield "turned matrices are rounded to nearest"
        plan = recipe.replication
        if plan is not None and plan.makes_codes and plan.differ not in solved:
            yield (
                "copies that differ in their codes are rounded to nearest (residual codes and digits by gptq "
                "too)"
            )

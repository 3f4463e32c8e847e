"""A space of recipes: one recipe, and which of its fields may have which values.

    name: two-bit
    recipe:                                  # into this the values are put
      weights: {format: int2, granularity: g64}
    parameters:
      weights.granularity: [g32, g64, g128]              # one of these
      weights.offset: {low: 0.0, high: 0.5}              # a number between, both ends included
      learned.steps: {low: 25, high: 200, log: true}     # a whole number, as both ends are
      rotation: [null, {}]                               # a part that is there, or not

A parameter's name is the path of the field in the recipe, with a number for the place in a list, and null
takes a field away. Values are put in this order, so that a part may be chosen and then a field of it. What
makes no sense as a recipe is refused by the recipe itself.
"""

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from bitassay.errors import BitassayError, suggestion
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.spec import Spec
from bitassay.record.files import read_yaml
from bitassay.record.hashing import digest_json
from bitassay.record.schema import defects

SHIPPED = Path(str(files("bitassay") / "search" / "spaces"))
MOST_POINTS = 100_000  # of a grid

Value = Any  # what YAML holds: a number, text, null, or a part of a recipe
Values = Mapping[str, Value]


class Range(Spec):
    """Numbers from `low` to `high`, whole ones where all that is given is whole; log: each doubling alike."""

    low: int | float
    high: int | float
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False

    @property
    def is_whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _makes_sense(self) -> "Range":
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"no numbers lie between {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: takes a low above 0 and no step")
        return self

    def holds(self, value: Value) -> bool:
        """Return whether `value` lies in the range and on its steps."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        steps, slack = (value - self.low) / (self.step or 1), 1e-9
        within = self.low - slack <= value <= self.high + slack
        return within and (self.step is None or abs(steps - round(steps)) < slack)

    def points(self) -> list[int | float]:
        """Return all numbers of the range. Raises ValueError where it has no step."""
        step = self.step or (1 if self.is_whole and not self.log else None)
        if step is None:
            raise ValueError("a grid has no use for a range without a step")
        count = int((self.high - self.low) / step + 1e-9)
        return [self.low + index * step for index in range(count + 1)]


class Space(Spec):
    """What is searched. Raises ValueError for a path that leads nowhere."""

    name: str = Field(pattern=r"^[\w.+-]{1,48}$")
    description: str = Field("", max_length=1000)
    recipe: dict[str, Any]
    parameters: dict[str, Range | list[Value]] = Field(min_length=1)

    @model_validator(mode="after")
    def _makes_sense(self) -> "Space":
        for path, choices in self.parameters.items():
            if isinstance(choices, list) and len({label(choice) for choice in choices}) != len(choices):
                raise ValueError(f"{path}: one of its values is there twice")
            if isinstance(choices, list) and not choices:
                raise ValueError(f"{path}: no values to choose from")
            _put(copy.deepcopy(self.recipe), path, None)
        return self

    def recipe_of(self, values: Values) -> Recipe:
        """Return the recipe with these values. Raises BitassayError where they make no valid recipe."""
        content = copy.deepcopy(self.recipe)
        for path, value in values.items():
            _put(content, path, copy.deepcopy(value))
        content["name"] = f"{self.name}-{digest_json(content)[:8]}"
        try:
            return Recipe.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BitassayError(f"{where}: {first['msg']}" if where else first["msg"]) from error

    def values_of(self, recipe: Recipe) -> dict[str, Value] | None:
        """Return the values that make this recipe; None where it is outside the space."""
        fields = {path: _field(recipe, path) for path in self.parameters}
        values: dict[str, Value] = {}
        for path, choices in self.parameters.items():
            if isinstance(choices, Range):
                fitting = [fields[path]] if choices.holds(fields[path]) else []
            else:
                fitting = [choice for choice in choices if _is_same(recipe, fields | {path: choice})]
            if not fitting:
                return None
            values[path] = fitting[0]
        return values if self.recipe_of(values).recipe_id == recipe.recipe_id else None

    def grid(self) -> Iterator[dict[str, Value]]:
        """Return every combination of values. Raises BitassayError for a range without a step
        and for too many."""
        try:
            every = [c if isinstance(c, list) else c.points() for c in self.parameters.values()]
        except ValueError as error:
            raise BitassayError(f"{self.name}: {error}", "give ranges a step, or --sampler tpe") from error
        if (count := math.prod(map(len, every))) > MOST_POINTS:
            raise BitassayError(f"{self.name}: a grid of {count} recipes", "fewer values, or --sampler tpe")
        return (dict(zip(self.parameters, point, strict=True)) for point in itertools.product(*every))


def label(value: Value) -> str | int | float | bool | None:
    """Return a value as samplers and tables hold it: lists and mappings as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _put(content: Any, path: str, value: Value) -> None:
    """Set the field at `path`, making the parts on the way; null takes it away."""
    *way, last = path.split(".")
    for name in way:
        if isinstance(content, list):
            content = content[_place(content, name, path)]
        elif isinstance(content, dict):
            if content.get(name) is None:
                content[name] = {}
            content = content[name]
        if not isinstance(content, (dict, list)):
            raise ValueError(f"{path}: {name} is {content!r}, which has no fields")
    if isinstance(content, list):
        content[_place(content, last, path)] = value
    elif value is None:
        content.pop(last, None)
    else:
        content[last] = value


def _field(recipe: Recipe, path: str) -> Value:
    """What a recipe has at `path`; null where it leads to nothing."""
    value: Any = recipe
    for name in path.split("."):
        if isinstance(value, tuple):
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = getattr(value, name, None)
    return to_jsonable_python(value)


def _is_same(recipe: Recipe, values: Values) -> bool:
    """Whether a recipe stays what it is when these values are put into it."""
    content = recipe.to_yaml_dict()
    try:
        for path, value in values.items():
            _put(content, path, copy.deepcopy(value))
        return Recipe.model_validate(content).recipe_id == recipe.recipe_id
    except ValueError:  # a path that leads nowhere, or no recipe
        return False


def _place(content: list[Any], name: str, path: str) -> int:
    if not name.isdecimal() or int(name) >= len(content):
        raise ValueError(f"{path}: {name!r} is no place in a list of {len(content)}")
    return int(name)


def find_space(space: "str | Path | Space") -> Space:
    """Return a space by its name, if it is shipped, or from the YAML file at that path; a Space as it is.
    Raises BitassayError that names the nearest choices, or the file and the field."""
    if isinstance(space, Space):
        return space
    if (path := Path(space)).suffix not in (".yaml", ".yml"):
        names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        if str(space) not in names:
            raise BitassayError(
                f"no space is called {str(space)!r}; {suggestion(str(space), names)}",
                "give one of them, or the path of a .yaml file",
            )
        path = SHIPPED / f"{space}.yaml"
    try:
        return Space.model_validate(read_yaml(path))
    except ValidationError as error:
        raise BitassayError(f"{path}: not a space: {defects(error, Space)}", "see docs/search.md") from error

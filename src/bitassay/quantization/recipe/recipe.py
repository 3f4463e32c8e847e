"""A recipe: everything that makes the changed model, from YAML or Python.

    name: w4
    weights: {format: int4, granularity: g64, symmetric: false}
    overrides:
      - {match: "*.down_proj", weights: {format: int8, granularity: channel}}
      - {match: "model.layers.0.*", weights: null}        # left as it is

The first override whose pattern matches a module's name wins. A recipe's id is the digest of its canonical
JSON without name and description: the same change has the same id, whatever it is called.

An installed package adds a part by an entry point in the group `bitassay.solvers` (`solvers/solver.py`). Its
name is then a field of recipes, which its spec checks and which is part of the id.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError, model_serializer, model_validator

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.calibration import Calibration
from bitassay.quantization.recipe.files import REMEDY, SHIPPED, read_recipe_file, recipe_file
from bitassay.quantization.recipe.inputs import Activations, KvCache
from bitassay.quantization.recipe.replication import ReplicationPlan
from bitassay.quantization.recipe.solvers import Gptq, Learned, LowRankSpec, Mixed, Tune
from bitassay.quantization.recipe.spec import RecipePart, SolverPart, Spec, validate_as
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.record.hashing import digest_json
from bitassay.record.schema import defects
from bitassay.registry import Registry

BASE = "base"  # what tables call the model that recipes change
PLUGINS: Registry[Any] = Registry("solvers")  # of installed packages; the part of each is a field of recipes
T = TypeVar("T")


class Override(Spec):
    """Another scheme, or none, for the modules whose full name matches the glob `match`."""

    match: str
    weights: WeightScheme | None


class Recipe(Spec):
    """What is done to the decoder layers' matrices; embeddings, norms and the output head stay as they are.
    Parts are listed in the order in which they are done; `plugins` holds those of installed packages, which
    YAML and JSON have at the top level."""

    name: str = Field(pattern=r"^[\w.+-]{1,64}$")
    description: str = Field(default="", max_length=1000)
    weights: WeightScheme | None
    overrides: tuple[Override, ...] = ()
    calibration: Calibration | None = None
    rotation: Rotation | None = None
    smoothing: Smoothing | None = None
    mixed: Mixed | None = None
    plugins: dict[str, SerializeAsAny[SolverPart]] = Field(default_factory=dict)
    gptq: Gptq | None = None
    low_rank: LowRankSpec | None = None
    learned: Learned | None = None
    tune: Tune | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    replication: ReplicationPlan | None = None

    @model_validator(mode="before")
    @classmethod
    def _plugins_at_top(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if "plugins" in fields:
            raise ValueError("there is no field 'plugins': a plug-in's part has a field of its own name")
        names = [name for name in fields if name not in cls.model_fields and name in PLUGINS]
        plugins = {name: validate_as(PLUGINS[name].part, fields[name]) for name in names}
        return {name: value for name, value in fields.items() if name not in names} | {"plugins": plugins}

    @model_serializer(mode="wrap")
    def _plugins_written_at_top(self, dump: Any) -> dict[str, Any]:
        fields = dump(self)
        return fields | fields.pop("plugins", {})

    def contradictions(self) -> Iterator[str]:
        for name, part in self.parts.items():
            for reason in part.conflicts(self):
                yield f"{name}: {reason}"
        if any(scheme.copies is not None for scheme in (*self.schemes, *self.choices)):
            yield (
                "copies: a recipe says them once, for all matrices: "
                "replication: {how: parallel, of: linear, differ: ...}"
            )
        solvers = [*self.plugins, *(["gptq"] if self.gptq is not None else [])]
        if len(solvers) > 1:
            yield f"{' and '.join(solvers)}: one of them rounds a matrix"

    @property
    def parts(self) -> dict[str, RecipePart]:
        """The parts that the recipe has, by name, in the order in which they are done."""
        present: dict[str, RecipePart] = {}
        for name in type(self).model_fields:
            if name == "plugins":
                present |= self.plugins
            elif isinstance(part := getattr(self, name), RecipePart):
                present[name] = part
        return present

    def steps(self, registered: Mapping[str, T]) -> list[tuple[T, Any]]:
        """Return what is registered for each part of the recipe, with the part."""
        return [(registered[name], part) for name, part in self.parts.items() if name in registered]

    @property
    def schemes(self) -> list[WeightScheme]:
        """The schemes that matrices may have, without the choices of `mixed`."""
        schemes = (self.weights, *(override.weights for override in self.overrides))
        return [scheme for scheme in schemes if scheme is not None]

    @property
    def choices(self) -> list[WeightScheme]:
        """The schemes that mixed bits choose among; none without `mixed`."""
        return self.mixed.choices(self.weights) if self.mixed is not None and self.weights else []

    @property
    def text(self) -> Calibration:
        """The calibration text, by default where the recipe names none."""
        return self.calibration or Calibration()

    @property
    def is_calibrated(self) -> bool:
        """Whether the result depends on calibration text."""
        return self.calibration is not None or any(part.needs_text for part in self.parts.values())

    @property
    def uses_calibrated_solver(self) -> bool:
        """Whether codes are more than weights rounded to nearest."""
        return any(part.solves for part in self.parts.values())

    @property
    def input_copies(self) -> int:
        """How many rounded copies of an input are averaged; 1: it is rounded once."""
        plan = self.replication
        return plan.copies if plan is not None and plan.averages_inputs else 1

    @property
    def coded_replication(self) -> ReplicationPlan | None:
        """The replication whose copies have codes of their own; None where there are no such copies."""
        plan = self.replication
        return plan if plan is not None and plan.makes_codes else None

    @property
    def without_postprocessing(self) -> "Recipe":
        """The recipe that makes the same codes, without what comes after them."""
        return self.model_copy(
            update={name: None for name, part in self.parts.items() if not part.changes_codes(self)}
        )

    @property
    def recipe_id(self) -> str:
        return digest_json(self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True))

    def override_for(self, module: str) -> Override | None:
        """Return the first override whose pattern matches."""
        return next((o for o in self.overrides if fnmatchcase(module, o.match)), None)

    def scheme_for(self, module: str) -> WeightScheme | None:
        """Return the scheme of the module of that full name; None: leave it."""
        override = self.override_for(module)
        return self.weights if override is None else override.weights

    def possible_schemes(self, names: Iterable[str]) -> list[dict[str, WeightScheme]]:
        """Return the schemes of the named matrices that have one, for each choice of mixed bits."""
        schemes = {name: scheme for name in names if (scheme := self.scheme_for(name))}
        free = {name for name in schemes if self.override_for(name) is None}
        return [schemes | dict.fromkeys(free, choice) for choice in self.choices] or [schemes]


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: read_recipe(path) for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(recipe: "str | Path | Recipe") -> Recipe:
    """Return a recipe itself, the shipped one of that name, or the one in that file; else BitassayError."""
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe_file(str(recipe)))


def row_names(recipes: Sequence[Recipe], others: Sequence[str] = ()) -> list[str]:
    """Return the names of a table's rows. Raises BitassayError where two would be called the same."""
    names = [BASE, *(recipe.name for recipe in recipes), *others]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BitassayError(f"two rows would be called {repeated[0]!r}", "give each a name of its own")
    return names


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; a defect is a BitassayError that names the file and the field."""
    content = read_recipe_file(path)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise BitassayError(f"{path}: not a recipe: {defects(error, Recipe)}", REMEDY) from error

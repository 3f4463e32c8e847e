"""A recipe: everything that makes the changed model, from YAML or Python.

    name: w4
    weights: {format: int4, granularity: g64, symmetric: false}
    overrides:
      - {match: "*.down_proj", weights: {format: int8, granularity: channel}}
      - {match: "model.layers.0.*", weights: null}        # left as it is

The first override whose pattern matches a module's name wins. A recipe's id is the digest of its canonical
JSON without name and description: the same change has the same id, whatever it is called.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.calibration import Calibration
from bitassay.quantization.recipe.files import REMEDY, SHIPPED, read_recipe_file, recipe_file
from bitassay.quantization.recipe.inputs import Activations, KvCache, has_product
from bitassay.quantization.recipe.replication import Chosen, ReplicationPlan
from bitassay.quantization.recipe.solvers import Gptq, Learned, LowRankSpec, Mixed, Tune
from bitassay.quantization.recipe.spec import Spec
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.recipe.weights import SUMS, WeightScheme
from bitassay.record.hashing import digest_json
from bitassay.record.schema import defects

# What a recipe may do beside rounding, in the order in which it is done.
PARTS = (
    "rotation",
    "smoothing",
    "mixed",
    "gptq",
    "low_rank",
    "learned",
    "tune",
    "activations",
    "kv_cache",
    "replication",
)
BASE = "base"  # what tables call the model that recipes change


class Override(Spec):
    """Another scheme, or none, for the modules whose full name matches the glob `match`."""

    match: str
    weights: WeightScheme | None


class Recipe(Spec):
    """What is done to the decoder layers' matrices; embeddings, norms and the output head stay as they
    are."""

    name: str = Field(pattern=r"^[\w.+-]{1,64}$")
    description: str = Field(default="", max_length=1000)
    weights: WeightScheme | None
    overrides: tuple[Override, ...] = ()
    calibration: Calibration | None = None
    rotation: Rotation | None = None
    smoothing: Smoothing | None = None
    mixed: Mixed | None = None
    gptq: Gptq | None = None
    learned: Learned | None = None
    low_rank: LowRankSpec | None = None
    tune: Tune | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    replication: ReplicationPlan | None = None

    @model_validator(mode="after")
    def _choices_make_sense(self) -> "Recipe":
        if self.mixed is not None:
            if self.weights is None:
                raise ValueError("mixed: its formats are variants of weights, of which there are none")
            self.mixed.choices(self.weights)
        for wrong, why in _contradictions(self):
            if wrong:
                raise ValueError(why)
        plan = self.replication
        if plan is not None and plan.makes_codes:
            for scheme in (self.weights, *(o.weights for o in self.overrides)):
                if scheme is not None:
                    scheme.with_copies(plan.of_matrices(plan.copies))
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether the result depends on calibration text."""
        refined = self.rotation is not None and self.rotation.kind == "refined"
        static = self.activations is not None and self.activations.any_needs_calibration
        replicated = self.replication is not None and self.replication.is_calibrated
        parts = (
            self.calibration,
            self.smoothing,
            self.mixed,
            self.gptq,
            self.learned,
            self.low_rank,
            self.tune,
        )
        return refined or static or replicated or any(part is not None for part in parts)

    @property
    def solves(self) -> bool:
        """Whether codes are more than weights rounded to nearest."""
        return any(part is not None for part in (self.gptq, self.learned, self.low_rank, self.tune))

    @property
    def codes_alone(self) -> "Recipe":
        """The recipe that makes the same codes, without what comes after them."""
        plan = self.replication
        after: dict[str, None] = {"kv_cache": None}
        if plan is not None and not plan.makes_codes:
            after["replication"] = None
        if self.smoothing is None or self.smoothing.method != "smoothquant":  # which is for rounded inputs
            after["activations"] = None
        return self.model_copy(update=after)

    @property
    def recipe_id(self) -> str:
        return digest_json(self.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True))

    def override_for(self, module: str) -> Override | None:
        """The first override whose pattern matches."""
        return next((o for o in self.overrides if fnmatchcase(module, o.match)), None)

    def scheme_for(self, module: str) -> WeightScheme | None:
        """The scheme of the module of that full name; None: leave it."""
        override = self.override_for(module)
        return self.weights if override is None else override.weights


def _contradictions(recipe: Recipe) -> list[tuple[bool, str]]:
    """Combinations that make no sense, and why."""
    schemes = [s for s in (recipe.weights, *(o.weights for o in recipe.overrides)) if s is not None]
    moving = [name for name in ("learned", "tune") if getattr(recipe, name) is not None]
    solving = [*moving, *(["gptq"] if recipe.gptq is not None else [])]
    tuned = recipe.tune is not None
    return [
        (not schemes and bool(solving), f"{' and '.join(solving)}: there are no weights to round"),
        (
            bool(solving) and any(s.rounding != "nearest" or s.noise for s in schemes),
            f"{' and '.join(solving)}: decides what is rounded where, so rounding and noise have no say",
        ),
        (
            bool(moving) and any(s.number_format.kind == "float" for s in schemes),
            f"{' and '.join(moving)}: moves codes by steps, and FP8 codes have no common step",
        ),
        (
            bool(moving) and any(s.has_planes for s in schemes),
            f"{' and '.join(moving)}: moves codes along a grid, and binary planes lie on none",
        ),
        (
            bool(moving) and any(s.granularity == "tensor" for s in schemes),
            f"{' and '.join(moving)}: needs a scale for each row or group",
        ),
        (
            tuned and not any((recipe.tune.codes, recipe.tune.scales, recipe.tune.norms)),  # type: ignore[union-attr]
            "tune: all learning rates are zero",
        ),
        *_input_contradictions(recipe, schemes),
        *_copy_contradictions(recipe, schemes),
    ]


def _copy_contradictions(recipe: Recipe, schemes: list[WeightScheme]) -> list[tuple[bool, str]]:
    """The same, of copies of layers and of matrices."""
    plan, inputs = recipe.replication, recipe.activations
    makes = plan is not None and plan.makes_codes
    differ = plan.differ if plan is not None and makes else None
    several = [*schemes, *(recipe.mixed.choices(recipe.weights) if recipe.mixed and recipe.weights else [])]
    solving = [name for name in ("gptq", "low_rank", "learned", "tune") if getattr(recipe, name) is not None]
    if differ in SUMS and "gptq" in solving:
        solving.remove("gptq")
    return [
        (
            makes and not schemes,
            "replication: copies with codes of their own, and there are no weights to round",
        ),
        (
            any(s.copies is not None for s in several),
            "copies: a recipe says them once, for all matrices: "
            "replication: {how: parallel, of: linear, differ: ...}",
        ),
        (
            makes and bool(solving),
            f"{' and '.join(solving)}: copies that differ in their codes are rounded to nearest"
            " (residual codes and digits by gptq too)",
        ),
        (
            recipe.gptq is not None and recipe.gptq.planes is not None and differ != "residual",
            "gptq: planes: apart is of residual codes, and there are none",
        ),
        (
            any(s.turned is not None for s in schemes) and bool(solving),
            f"{' and '.join(solving)}: turned matrices are rounded to nearest",
        ),
        (
            plan is not None
            and isinstance(plan.layers, Chosen)
            and plan.layers.by != "massive"
            and not schemes,
            "replication: layers are chosen by what quantizing their weights does, and there are no weights",
        ),
        (
            plan is not None
            and (plan.coefficients == "fitted" or plan.of == "block")
            and recipe.rotation is not None
            and recipe.rotation.r1 == "online",
            "replication: coefficients cannot be fitted, nor blocks repeated, where layers turn the stream: "
            "r1: folded",
        ),
        (
            plan is not None and plan.differ == "inputs" and (inputs is None or not inputs.has_steps),
            "replication: copies that differ by inputs need activations rounded to integers",
        ),
    ]


def _input_contradictions(recipe: Recipe, schemes: list[WeightScheme]) -> list[tuple[bool, str]]:
    """The same, of the parts that have to do with the inputs of linears."""
    part, smoothing = recipe.activations, recipe.smoothing
    inputs = [] if part is None else [s for s in (part, *(o.inputs for o in part.overrides)) if s is not None]
    method = None if smoothing is None else smoothing.method
    return [
        (
            any(not has_product(i, w) for i in inputs for w in schemes),
            "activations: no device multiplies integer inputs with FP8 weights",
        ),
        (
            method == "smoothquant" and not inputs,
            "smoothing: smoothquant makes inputs easier to round, and no activations are rounded",
        ),
        (method == "awq" and not schemes, "smoothing: awq makes weights easier to round, and there are none"),
        (
            smoothing is not None and smoothing.clip and any("adaptive" in s.granularity for s in schemes),
            "smoothing: clip looks at groups, and adaptive ones are chosen after it",
        ),
    ]


def shipped_recipes() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    return {path.stem: read_recipe(path) for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(recipe: "str | Path | Recipe") -> Recipe:
    """A recipe itself, the name of a shipped one, or the path of a YAML file.

    Raises BitassayError that names the nearest choices.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return read_recipe(recipe_file(str(recipe)))


def row_names(recipes: Sequence[Recipe], others: Sequence[str] = ()) -> list[str]:
    """What the rows of a table are called: the base model, what recipes make of it, and other models. Raises
    BitassayError where two would be called the same."""
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

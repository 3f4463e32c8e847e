"""What a replicated recipe has to beat: plain recipes that cost as much. `controls` makes them.

    single        the same recipe, every layer once
    rescaled      of fitted copies: the same layers once, their coefficients fitted too, so that what comes of
                  rescaling a layer's output is not credited to its further passes
    equal-bits    one matrix of as many stored bits as all copies together
    equal-flops   one pass with as many bit operations: passes x bits of a weight (x bits of an input). Not
                  floating-point operations, of which a pass has as many at any bits: equal are the bits of
                  weights that decoding a token reads, and so its time where reading is what takes it

n copies of b bits in groups of g weights store as much as one matrix of n b bits in groups of g / n (rounded
up); that recipe also does their bit operations in one pass. Where there is no integer of n b bits, or layers
have different counts, the control is mixed bits at the same average, spent where they matter most. Copies
that share their codes store nothing more, so at equal bits their control is `single`; n roundings of the
inputs to a bits do the work of one to n a bits. A control has the better grid of its bits: symmetric codes
lie evenly around zero, whatever the replica's do. Above 8 bits a control has 8, which is less than it may. Of
passes that stop, those that a budget allows are counted; without one, all, which is an upper bound: what the
control read beyond the copies is in the studies' `read_ratio`. There is no such control where no wider format
is at hand (codes of 8 bits, floats), nor, of some layers alone, beside overrides or for grids of inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bitassay.quantization.recipe.formats import INPUT_FORMATS
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.inputs import Activations
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.recipe.replication import Chosen, ReplicationPlan
from bitassay.quantization.recipe.weights import WeightScheme

Kind = Literal["single", "rescaled", "equal-bits", "equal-flops"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REPLICA = "replica"
INTEGERS = {bits: f"int{bits}" for bits in (8, 4, 3, 2)}  # controls do not depend on installed packages
INPUT_INTEGERS = {int(f.bits): f.name for f in INPUT_FORMATS.values() if f.kind == "integer"}


@dataclass(frozen=True)
class Control:
    """A plain recipe, and in what it equals the replicated one."""

    kinds: tuple[Kind, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Place:
    """A row of the results: a group, what the variant is in it, and the variant's name."""

    group: str
    role: str
    variant: str


def controls(recipe: Recipe, layers: int) -> list[Control]:
    """Return the controls of a recipe for a model of `layers` decoder layers; none for one without copies."""
    plan = recipe.replication
    if plan is None or plan.copies == 1:
        return []
    rescaled = []
    if plan.coefficients == "fitted":
        once = {"copies": 1, "coefficients": "fitted", "layers": _layers_with_copies(plan, layers)}
        rescaled = [Control(("rescaled",), _changed(recipe, "rescaled", {"replication": once}))]
    return [*_plain_controls(recipe, plan, layers), *rescaled]


def changes_nothing(recipe: Recipe) -> bool:
    """Return whether a recipe leaves every model as it is."""
    return recipe.model_copy(update={"calibration": None}) == Recipe(
        name=recipe.name, description=recipe.description, weights=None
    )


def with_controls(recipes: Sequence[Recipe], layers: int) -> tuple[tuple[Recipe, ...], list[Place]]:
    """Return the recipes, each with its controls after it, and a place for every control, for a model of
    `layers` layers. A control that another recipe is already, or the base model, is no recipe of its own."""
    names = {recipe.recipe_id: recipe.name for recipe in recipes}
    variants, places = list[Recipe](), list[Place]()
    for recipe in recipes:
        variants.append(recipe)
        for control in controls(recipe, layers):
            plain = control.recipe
            name = BASE if changes_nothing(plain) else names.get(plain.recipe_id)
            if name is None:
                name = names[plain.recipe_id] = plain.name
                variants.append(plain)
            places.append(Place(recipe.name, ", ".join(control.kinds), name))
    return tuple(variants), places


def _plain_controls(recipe: Recipe, plan: ReplicationPlan, layers: int) -> list[Control]:
    single, counts = _changed(recipe, "single", {}), plan.counts(layers)
    if plan.differ == "inputs":
        made = [Control(("single", "equal-bits"), single)]
        if wider := _more_input_bits(recipe, counts):
            made.append(Control(("equal-flops",), _changed(recipe, "inputs", wider)))
        return made
    if recipe.weights is None:
        return [Control(("single", "equal-bits"), single)]
    passes = sum(counts) / layers
    budget = None if plan.stop is None else plan.stop.budget
    times: dict[Kind, float] = {
        "single": 1.0,
        "equal-bits": passes if plan.makes_codes else 1.0,
        "equal-flops": passes if budget is None else min(passes, 1 + budget / layers),
    }
    made = []
    for mean in dict.fromkeys(times.values()):
        kinds: tuple[Kind, ...] = tuple(kind for kind, wanted in times.items() if wanted == mean)
        more = {} if mean == 1 else _more_bits(recipe, recipe.weights, counts, mean)
        if more is not None:
            made.append(Control(kinds, _changed(recipe, kinds[0], more)))
    return made


def _layers_with_copies(plan: ReplicationPlan, layers: int) -> Any:
    """The layers that have copies, as a plan says it that gives each one."""
    if plan.layers == "all" or isinstance(plan.layers, Chosen):
        return plan.layers
    return tuple(plan.known_counts(layers) or ())


def _changed(recipe: Recipe, suffix: str, change: dict[str, Any]) -> Recipe:
    """A valid recipe without these copies, weighed by the text that weighs the replicated one, if any."""
    fields = recipe.to_yaml_dict()
    for part, gone in ((fields, "replication"), (fields, "description"), (fields.get("gptq", {}), "planes")):
        part.pop(gone, None)
    return Recipe.model_validate({**fields, "name": f"{recipe.name[:56]}-{suffix}", **change})


def _more_bits(
    recipe: Recipe, weights: WeightScheme, counts: list[int], mean: float
) -> dict[str, Any] | None:
    """What makes a recipe store `mean` times as much; None: nothing does."""
    fmt, count, mixed = weights.number_format, counts[0], recipe.mixed
    wider = [bits for bits in sorted(INTEGERS) if fmt.bits < bits]
    if fmt.kind in ("float", "table") or not wider:
        return None
    schemes = [override.weights for override in recipe.overrides]
    if mixed is None and set(counts) == {mean} and min(8.0, fmt.bits * count) in INTEGERS:
        overrides = [
            override.model_dump() | {"weights": scheme and widened(scheme, count)}
            for override, scheme in zip(recipe.overrides, schemes, strict=True)
        ]
        return {"weights": widened(weights, count), "overrides": overrides}
    if any(schemes):
        return None
    had = mixed.choices(weights) if mixed else [weights]
    choices = [scheme.model_dump() for scheme in had]
    known = {scheme.format for scheme in had}
    choices += [_plain(weights) | {"format": INTEGERS[bits]} for bits in wider if INTEGERS[bits] not in known]
    most = nominal_bits(WeightScheme.model_validate(choices[-1]))
    bits = min(most, mean * (mixed.bits if mixed else nominal_bits(weights)))
    how = mixed.model_dump() if mixed else {}
    return {"mixed": how | {"bits": round(bits, 4), "formats": choices}}


def widened(scheme: WeightScheme, count: int) -> dict[str, Any]:
    """Return the fields of a scheme that stores in one matrix the bits of `count` of them, never more."""
    bits = max(b for b in INTEGERS if b <= max(min(8.0, scheme.number_format.bits * count), min(INTEGERS)))
    granularity = Granularity.parse(scheme.granularity)
    fields = _plain(scheme) | {"format": INTEGERS[bits]}
    if granularity.group_size is not None:
        fields["granularity"] = f"g{-(-granularity.group_size // count)}"
    return fields


def _plain(scheme: WeightScheme) -> dict[str, Any]:
    """The fields that say something about integers of any size. Symmetric codes get half a step of offset,
    which leaves less error at 2, 3 and 4 bits, and the scale is searched, for the control's sake."""
    kept = scheme.model_dump(include={"granularity", "symmetric", "scale_dtype", "zero_point", "offset"})
    return kept | {"scale": "mse"} | ({"offset": 0.5} if scheme.symmetric else {})


def nominal_bits(scheme: WeightScheme) -> float:
    """Return bits a weight with scales and zero points, for groups that divide the row."""
    granularity, fmt = Granularity.parse(scheme.granularity), scheme.number_format
    size = granularity.group_size or (granularity.block_sizes[1] if granularity.block_sizes else None)
    if size is None:
        return float(fmt.bits)
    scale = 32 if scheme.scale_dtype == "float32" else 16
    zero = 0.0
    if not scheme.symmetric:
        zero = scale if fmt.kind == "binary" or scheme.zero_point == "free" else fmt.bits
    return fmt.bits + (scale + zero) / size


def _more_input_bits(recipe: Recipe, counts: list[int]) -> dict[str, Any] | None:
    part = recipe.activations
    assert isinstance(part, Activations)
    bits = int(INPUT_FORMATS[part.format].bits)
    allowed = max(b for b in INPUT_INTEGERS if b <= max(bits * counts[0], min(INPUT_INTEGERS)))
    if len(set(counts)) > 1 or allowed <= bits:
        return None
    return {"activations": part.model_dump() | {"format": INPUT_INTEGERS[allowed]}}

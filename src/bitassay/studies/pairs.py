"""A replica less its controls, on the same windows.

A replica *beats* a control where its KL to the base is lower beyond doubt, `false` where it is higher beyond
doubt, and None where the interval, paired by window, holds zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitassay.evaluate.compare import text_difference
from bitassay.evaluate.divergence import TokenScores
from bitassay.quantize.recipe import BASE, Recipe
from bitassay.replicate.controls import controls


@dataclass(frozen=True)
class Place:
    """A row of the results: a group, what the variant is in it (plain, replica, or in what it equals the
    replica), and the variant's name."""

    group: str
    role: str
    variant: str


def changes_nothing(recipe: Recipe) -> bool:
    """Whether what it makes of a model is the model."""
    return recipe.model_copy(update={"calibration": None}) == Recipe(
        name=recipe.name, description=recipe.description, weights=None
    )


def with_controls(recipes: Sequence[Recipe], layers: int) -> tuple[tuple[Recipe, ...], list[Place]]:
    """The recipes, the controls of each one with copies below it, and which these are, for a model of so many
    layers. A control that another recipe is already, or the base model, is no recipe of its own."""
    names = {recipe.recipe_id: recipe.name for recipe in recipes}
    found, places = list[Recipe](), list[Place]()
    for recipe in recipes:
        found.append(recipe)
        for control in controls(recipe, layers):
            own = control.recipe
            name = BASE if changes_nothing(own) else names.get(own.recipe_id)
            if name is None:
                name = names[own.recipe_id] = own.name
                found.append(own)
            places.append(Place(recipe.name, ", ".join(control.kinds), name))
    return tuple(found), places


def pair(place: Place, replica: str, text: Mapping[str, Sequence[TokenScores]], seed: int) -> dict[str, Any]:
    """The variant of that name less the control at `place`."""
    apart = text_difference(text[place.variant], text[replica], seed)
    return {
        "group": place.group,
        "role": place.role,
        "replica": replica,
        "control": place.variant,
        **asdict(apart),
        "beats": beats(apart.kl_ci),
    }


def beats(interval: tuple[float, float] | None) -> bool | None:
    """Of a difference that is good where it is negative; None: not decided."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return interval[1] < 0

"""The recipe's part `mixed`, done: measure what each choice costs each matrix, and spend the budget.

A unit is a linear, or all experts' slices of one fused parameter, which share their choice: there are
thousands of them, and most see too little text to be measured alone. A matrix that an override names keeps
its scheme, and counts.

error: the relative output error of each choice (`OutputError`), summed over units. kl: the divergence of each
unit under its coarsest choice; since a divergence grows with the square of a small change, the other choices
cost in proportion to their output errors. That is one run a unit and a sample, instead of one a choice.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import matrices
from bitassay.quantize.mixed import Mixed, allocate
from bitassay.quantize.recipe import Recipe
from bitassay.quantize.scheme import WeightScheme
from bitassay.quantize.sensitivity import OutputError, divergences, observe, places
from bitassay.quantize.tensor import QuantizedTensor, quantize_tensor
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder


class Unit(NamedTuple):
    """Matrices that share their choice, and whether there is one."""

    members: tuple[str, ...]
    free: bool


def mixed_schemes(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Int[Tensor, "samples tokens"],
    progress: Progress = silent,
    folder: RunFolder | None = None,
) -> dict[str, WeightScheme | None]:
    """A scheme for each of `matrices(model)` by `recipe.mixed`, None for those that the recipe leaves alone.

    With a folder the choice is a part of it. Raises BitassayError where the budget does not fit the choices.
    """
    spec, weights = recipe.mixed, recipe.weights
    assert spec is not None
    assert weights is not None
    choices = spec.choices(weights)

    def chosen() -> dict[str, int]:
        units = units_of(model, recipe)
        candidates = _candidates(model, recipe, units, choices, progress)
        costs = _costs(model, units, candidates, tokens[: spec.samples], spec, progress)
        return _spend(units, candidates, costs, spec)

    numbers = chosen() if folder is None else folder.part("mixed", chosen)
    return {
        name: recipe.scheme_for(name) if numbers.get(name) is None else choices[numbers[name]]
        for name in matrices(model)
    }


def units_of(model: PreTrainedModel, recipe: Recipe) -> list[Unit]:
    """The units of all matrices that are quantized."""
    found: dict[tuple[int, str, bool], list[str]] = {}
    for name, place in places(model).items():
        if recipe.scheme_for(name) is not None:
            key = (place.layer, place.kind, recipe.override_for(name) is None)
            found.setdefault(key, []).append(name)
    return [Unit(tuple(members), key[2]) for key, members in found.items()]


def _candidates(
    model: PreTrainedModel, recipe: Recipe, units: list[Unit], choices: list[WeightScheme], progress: Progress
) -> dict[str, list[QuantizedTensor]]:
    """Every matrix rounded to nearest in every way that it may be; in one where it has no choice."""
    views, found = matrices(model), {}
    total = sum(len(unit.members) for unit in units)
    for unit in units:
        for name in unit.members:
            progress("rounding every matrix to every choice", len(found), total)
            own = choices if unit.free else [scheme for scheme in [recipe.scheme_for(name)] if scheme]
            found[name] = [quantize_tensor(views[name], scheme, name) for scheme in own]
    progress("rounding every matrix to every choice", total, total)
    return found


def _costs(
    model: PreTrainedModel,
    units: list[Unit],
    candidates: Mapping[str, list[QuantizedTensor]],
    tokens: Int[Tensor, "samples tokens"],
    spec: Mixed,
    progress: Progress,
) -> list[list[float]]:
    """What each choice costs each unit."""
    free = [unit for unit in units if unit.free]
    errors = OutputError(model, {name: candidates[name] for unit in free for name in unit.members})
    observe(
        model,
        tokens,
        errors,
        lambda done: progress("measuring output errors of every choice", done, len(tokens)),
    )
    costs = []
    for unit in free:
        signal = sum(errors.signal[name] for name in unit.members)
        noise = np.sum([errors.noise[name] for name in unit.members], axis=0)
        # An input that is all zeros, or never came: nothing is known to be lost.
        costs.append(noise / signal if signal else np.zeros_like(noise))
    if spec.sensitivity == "kl":
        coarsest = [int(np.argmin(_bits(unit, candidates))) for unit in free]
        groups = {
            str(index): {name: candidates[name][choice] for name in unit.members}
            for index, (unit, choice) in enumerate(zip(free, coarsest, strict=True))
        }
        measured = np.zeros(len(free))
        for done, window in enumerate(tokens):
            for label, divergence in divergences(model, groups, window):
                measured[int(label)] += divergence / len(tokens)
                progress("measuring divergences", done * len(free) + int(label) + 1, len(tokens) * len(free))
        for index, choice in enumerate(coarsest):
            here = costs[index][choice]
            costs[index] = costs[index] * (measured[index] / here if here else 0.0)
    return [list(map(float, found)) for found in costs]


def _bits(unit: Unit, candidates: Mapping[str, list[QuantizedTensor]]) -> Int[np.ndarray, " choices"]:
    """What the unit stores under each choice."""
    return np.sum([[tensor.stored_bits for tensor in candidates[name]] for name in unit.members], axis=0)


def _spend(
    units: list[Unit],
    candidates: Mapping[str, list[QuantizedTensor]],
    costs: list[list[float]],
    spec: Mixed,
) -> dict[str, int]:
    """The number of the choice of each matrix that has one."""
    free = [unit for unit in units if unit.free]
    if not free:
        raise BitassayError(
            "mixed: every matrix has an override, so there is nothing to choose", "fewer overrides"
        )
    shapes = [tensors[0].shape for tensors in candidates.values()]
    weights = sum(rows * columns for rows, columns in shapes)
    fixed = sum(int(_bits(unit, candidates)[0]) for unit in units if not unit.free)
    bits = np.stack([_bits(unit, candidates) for unit in free])
    low, high = ((fixed + each.sum()) / weights for each in (bits.min(1), bits.max(1)))
    if not low <= spec.bits <= high:
        span = f"{math.ceil(low * 1000) / 1000:g} to {math.floor(high * 1000) / 1000:g}"
        raise BitassayError(
            f"mixed: a budget of {spec.bits:g} bits a weight, where the formats take {span}, scales included",
            f"bits: {span}, or other formats",
        )
    chosen = allocate(np.array(costs), bits, spec.bits * weights - fixed)
    return {name: int(choice) for unit, choice in zip(free, chosen, strict=True) for name in unit.members}

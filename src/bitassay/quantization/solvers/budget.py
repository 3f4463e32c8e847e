"""The recipe's part `mixed`, done: measure what each choice costs each matrix, and spend the budget.

A unit is a linear, or all experts' slices of one fused parameter, which share their choice: there are
thousands of them, and most see too little text to be measured alone. A matrix that an override names keeps
its scheme, and counts.

error: what each choice is predicted to do to the model's predictions (`predicted_divergences`), from one pass
over the text. kl: what it does, from one run for every unit, choice and sample.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import matrices
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Mixed
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.mixed import allocate
from bitassay.quantization.solvers.sensitivity import divergences, places, predicted_divergences
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
        return _spend(model, recipe, spec, choices, tokens[: spec.samples], progress)

    numbers = chosen() if folder is None else folder.part("mixed", chosen)
    return {
        name: recipe.scheme_for(name) if numbers.get(name) is None else choices[numbers[name]]
        for name in matrices(model)
    }


def _spend(
    model: PreTrainedModel,
    recipe: Recipe,
    spec: Mixed,
    choices: list[WeightScheme],
    tokens: Int[Tensor, "samples tokens"],
    progress: Progress,
) -> dict[str, int]:
    """The number of the choice of each matrix that has one."""
    units = units_of(model, recipe)
    candidates = _candidates(model, recipe, units, choices, progress)
    free = [unit for unit in units if unit.free]
    if not free:
        raise BitassayError(
            "mixed: every matrix has an override, so there is nothing to choose", "fewer overrides"
        )
    bits = np.stack([_bits(unit, candidates) for unit in free])
    shapes = [tensors[0].shape for tensors in candidates.values()]
    count = sum(rows * columns for rows, columns in shapes)
    fixed = sum(int(_bits(unit, candidates)[0]) for unit in units if not unit.free)
    fixed += sum(part.stored_bits(*shape) for part in recipe.parts.values() for shape in shapes)
    _check_budget(spec, (fixed + bits.min(1).sum()) / count, (fixed + bits.max(1).sum()) / count)
    costs = _costs(model, free, candidates, tokens, spec, progress)
    found = allocate(costs, bits, spec.bits * count - fixed)
    return {name: int(choice) for unit, choice in zip(free, found, strict=True) for name in unit.members}


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
    free: list[Unit],
    candidates: Mapping[str, list[QuantizedTensor]],
    tokens: Int[Tensor, "samples tokens"],
    spec: Mixed,
    progress: Progress,
) -> Float[np.ndarray, "units choices"]:
    """What each choice costs each unit that has one, in nats a token."""
    names = [name for unit in free for name in unit.members]
    if spec.sensitivity == "error":
        what = "predicting the divergence of every choice"
        own = {name: candidates[name] for name in names}
        found = predicted_divergences(model, own, tokens, lambda done: progress(what, done, len(tokens)))
        return np.array([np.sum([found[name] for name in unit.members], axis=0) for unit in free])
    choices = len(candidates[names[0]])
    costs, done = np.zeros((len(free), choices)), 0
    groups = {
        f"{index} {choice}": {name: candidates[name][choice] for name in unit.members}
        for index, unit in enumerate(free)
        for choice in range(choices)
    }
    for window in tokens:
        for label, divergence in divergences(model, groups, window):
            index, choice = map(int, label.split())
            costs[index, choice] += divergence / len(tokens)
            done += 1
            progress("measuring the divergence of every choice", done, len(tokens) * len(groups))
    return costs


def _bits(unit: Unit, candidates: Mapping[str, list[QuantizedTensor]]) -> Int[np.ndarray, " choices"]:
    """What the unit stores under each choice."""
    return np.sum([[tensor.stored_bits for tensor in candidates[name]] for name in unit.members], axis=0)


def _check_budget(spec: Mixed, low: float, high: float) -> None:
    """Raises BitassayError where no choice keeps to the budget, or every one does."""
    if not low <= spec.bits <= high:
        span = f"{math.ceil(low * 1000) / 1000:g} to {math.floor(high * 1000) / 1000:g}"
        raise BitassayError(
            f"mixed: a budget of {spec.bits:g} bits a weight, where the formats take {span}, scales included",
            f"bits: {span}, or other formats",
        )

"""Mixed bits: a scheme for each matrix, so that the average of stored bits stays under a budget.

Unit u under choice c costs d_uc (how much the model minds, `sensitivity.py`) and takes b_uc bits, scales and
all. Choose

    min sum_u d_u,c(u)   with   sum_u b_u,c(u) <= B

a multiple-choice knapsack, solved exactly as an integer program (HiGHS through scipy). That costs add up is
an assumption, the one that HAWQ-V2 (1911.03852), and most work since, makes.

A unit is a linear, or all experts' slices of one fused parameter, most of which see too little text to be
measured alone. A matrix that an override names keeps its scheme, and counts. Costs are what one pass over the
text predicts (`error`), or one run for every unit, choice and sample measures (`kl`). Left out: choices below
one matrix (groups of channels), and the order in which matrices spoil each other.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import matrices
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Mixed
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.sensitivity import (
    divergences_over,
    matrix_locations,
    predicted_divergences,
)
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder

TOLERANCE = 1e-5  # of the budget: more than HiGHS may overdraw it by
ROUNDING = "rounding every matrix to every choice"

Candidates = Mapping[str, list[QuantizedTensor]]


class Unit(NamedTuple):
    """Matrices that share their choice, and whether there is one."""

    members: tuple[str, ...]
    free: bool


def mixed_schemes(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Tokens,
    progress: Progress = silent,
    folder: RunFolder | None = None,
) -> dict[str, WeightScheme | None]:
    """Return a scheme for each of `matrices(model)` by its budget, None for those that the recipe leaves
    alone; kept in `folder`. Raises BitassayError where the budget does not fit the choices."""
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
    tokens: Tokens,
    progress: Progress,
) -> dict[str, int]:
    units, views = units_of(model, recipe), matrices(model)
    free = [unit for unit in units if unit.free]
    if not free:
        raise BitassayError(
            "mixed: every matrix has an override, so there is nothing to choose", "fewer overrides"
        )
    candidates: dict[str, list[QuantizedTensor]] = {}
    total = sum(len(unit.members) for unit in units)
    for unit in units:
        for name in unit.members:
            progress(ROUNDING, len(candidates), total)
            schemes = choices if unit.free else [scheme for scheme in [recipe.scheme_for(name)] if scheme]
            candidates[name] = [quantize_tensor(views[name], scheme, name) for scheme in schemes]
    progress(ROUNDING, total, total)
    bits = np.stack([_bits(unit, candidates) for unit in free])
    shapes = [views[name].shape for name in candidates]
    count = sum(rows * columns for rows, columns in shapes)
    fixed = sum(int(_bits(unit, candidates)[0]) for unit in units if not unit.free)
    fixed += sum(part.stored_bits(*shape) for part in recipe.parts.values() for shape in shapes)
    low, high = (fixed + bits.min(1).sum()) / count, (fixed + bits.max(1).sum()) / count
    if not low <= spec.bits <= high:
        span = f"{math.ceil(low * 1000) / 1000:g} to {math.floor(high * 1000) / 1000:g}"
        raise BitassayError(
            f"mixed: a budget of {spec.bits:g} bits a weight, where the formats take {span}, scales included",
            f"bits: {span}, or other formats",
        )
    costs = _costs(model, free, candidates, tokens, spec, progress)
    numbers = allocate(costs, bits, spec.bits * count - fixed)
    return {name: int(choice) for unit, choice in zip(free, numbers, strict=True) for name in unit.members}


def units_of(model: PreTrainedModel, recipe: Recipe) -> list[Unit]:
    """Return the units of all matrices that are quantized."""
    units: dict[tuple[int, str, bool], list[str]] = {}
    for name, location in matrix_locations(model).items():
        if recipe.scheme_for(name) is not None:
            key = (location.layer, location.kind, recipe.override_for(name) is None)
            units.setdefault(key, []).append(name)
    return [Unit(tuple(members), key[2]) for key, members in units.items()]


def _bits(unit: Unit, candidates: Candidates) -> Int[np.ndarray, " choices"]:
    return np.sum([[tensor.stored_bits for tensor in candidates[name]] for name in unit.members], axis=0)


def _costs(
    model: PreTrainedModel,
    free: list[Unit],
    candidates: Candidates,
    tokens: Tokens,
    spec: Mixed,
    progress: Progress,
) -> Float[np.ndarray, "units choices"]:
    if spec.sensitivity == "error":
        what = "predicting the divergence of every choice"
        measured = {name: candidates[name] for unit in free for name in unit.members}
        costs = predicted_divergences(model, measured, tokens, lambda done: progress(what, done, len(tokens)))
        return np.array([np.sum([costs[name] for name in unit.members], axis=0) for unit in free])
    choices = range(len(candidates[free[0].members[0]]))
    groups = {
        f"{index} {choice}": {name: candidates[name][choice] for name in unit.members}
        for index, unit in enumerate(free)
        for choice in choices
    }
    measured = divergences_over(model, groups, tokens, "measuring the divergence of every choice", progress)
    return np.array([[measured[f"{index} {choice}"] for choice in choices] for index in range(len(free))])


def allocate(
    costs: Float[np.ndarray, "units choices"], bits: Int[np.ndarray, "units choices"], budget: float
) -> Int[np.ndarray, " units"]:
    """Return the choice of each unit with the least sum of costs whose bits sum to at most `budget`; infinite
    costs are no choice. Raises BitassayError where no choice keeps to the budget."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    assert (costs >= 0).all(), "a cost is negative, or not a number"
    assert np.isfinite(costs).any(1).all(), "each unit needs a choice"
    count, choices = costs.shape
    allowed = np.isfinite(costs)
    least = np.where(allowed, bits, bits.max()).min(1).sum()
    if least > budget:
        raise BitassayError(f"a budget of {budget:.0f} bits, where the fewest that fit are {least}")
    finite = np.where(allowed, costs, 0.0)
    # HiGHS stops at an absolute gap of 1e-6.
    finite *= 1e4 / (finite.max() or 1.0)
    one_each = kron(eye_array(count), np.ones((1, choices)), format="csr")
    for share in (1.0, 1 - TOLERANCE):
        result = milp(
            finite.ravel(),
            integrality=np.ones(count * choices),
            bounds=Bounds(0, allowed.ravel().astype(float)),  # type: ignore[arg-type]
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(bits.ravel()[None] / budget, -np.inf, share),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:  # nothing takes less than all of the budget
            break
        chosen = result.x.reshape(count, choices).argmax(1)
        if bits[np.arange(count), chosen].sum() <= budget:
            return chosen
    assert least > (1 - TOLERANCE) * budget, result.message
    return np.where(allowed, bits, bits.max() + 1).argmin(1)

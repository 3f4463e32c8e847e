"""A solver: weights are multiplied by a factor before they are rounded.

Installed, the entry point `shrink` makes a field of recipes: `shrink: {factor: 0.5}`. The class says which
fields the part has and which combinations make no sense; the function wraps what quantizes matrices without
it, here rounding to nearest."""

from pydantic import Field

from bitassay.quantization.recipe.spec import SolverPart
from bitassay.quantization.solvers.solver import Matrices, MatrixSolver, Solution, Solver


class Shrink(SolverPart):
    """The factor that weights are multiplied by."""

    factor: float = Field(default=0.9, gt=0, le=1)


def shrunk(spec: Shrink, inner: MatrixSolver) -> MatrixSolver:
    """Return a function that quantizes matrices as `inner` does, after shrinking them."""

    def solve(matrices: Matrices) -> dict[str, Solution]:
        weights = {name: spec.factor * weight for name, weight in matrices.weights.items()}
        return inner(matrices._replace(weights=weights))

    return solve


solver = Solver(Shrink, matrices=shrunk)

"""All solvers, by the name of the recipe's part that asks for them.
Those of installed packages are found by entry points in the group `bitassay.solvers`, whose names are then
fields of recipes."""

from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Gptq, Learned, LowRankSpec, Tune
from bitassay.quantization.solvers import gptq, learned, low_rank, tune
from bitassay.quantization.solvers.solver import MatrixSolver, Solver, to_nearest
from bitassay.registry import Registry

SOLVERS: Registry[Solver] = Registry(
    "solvers",
    {
        "gptq": Solver(Gptq, matrices=gptq.solver),
        "low_rank": Solver(LowRankSpec, matrices=low_rank.solver),
        "learned": Solver(Learned, layer=learned.solve_layer),
        "tune": Solver(Tune, model=tune.solve_model),
    },
)


def solvers_of(recipe: Recipe) -> list[tuple[Solver, object]]:
    """Return the solvers that `recipe` asks for, each with its spec, in the order in which they are used."""
    return [(SOLVERS[name], part) for name, part in recipe.parts.items() if part.solves]


def matrix_solver(recipe: Recipe) -> MatrixSolver:
    """Return what quantizes matrices by `recipe`: to nearest, unless a part of it says otherwise."""
    solve = to_nearest
    for solver, spec in solvers_of(recipe):
        if solver.matrices is not None:
            solve = solver.matrices(spec, solve)
    return solve

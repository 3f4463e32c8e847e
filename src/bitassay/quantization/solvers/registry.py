"""All solvers, by the name of the recipe's part that asks for them, in the order in which they are used."""

from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.solvers import gptq, learned, low_rank, tune
from bitassay.quantization.solvers.solver import MatrixSolver, Solver, to_nearest
from bitassay.registry import Registry

SOLVERS: Registry[Solver] = Registry(
    "solvers",
    {
        "gptq": Solver(matrices=gptq.solver),
        "low_rank": Solver(matrices=low_rank.solver),
        "learned": Solver(layer=learned.solve_layer),
        "tune": Solver(model=tune.solve_model),
    },
)


def solvers_of(recipe: Recipe) -> list[tuple[Solver, object]]:
    """Return the solvers that `recipe` asks for, each with its spec."""
    parts = [(name, getattr(recipe, name, None)) for name in SOLVERS]
    return [(SOLVERS[name], spec) for name, spec in parts if spec is not None]


def matrix_solver(recipe: Recipe) -> MatrixSolver:
    """Return what quantizes matrices by `recipe`: to nearest, unless a part of it says otherwise."""
    solve = to_nearest
    for solver, spec in solvers_of(recipe):
        if solver.matrices is not None:
            solve = solver.matrices(spec, solve)
    return solve

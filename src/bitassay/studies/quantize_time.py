"""About how long quantizing will take: `quantize_seconds`, for `quantize --dry-run`.

Two things are timed on this machine, now: a product of matrices, and rounding one sample matrix the way the
recipe rounds. The rest is arithmetic on shapes,

    rounding      seconds a weight of the sample, times all weights
    text          2 operations a weight and token for each pass over the calibration text, and the products
                  of inputs, columns^2 a token for each input that is measured
    factorising   4/3 columns^3 for each of those, and rows x columns^2 for the errors that move on

so it is as good as these are, and of a machine that is busy with other things it says what these leave.
Reading and writing files, the check after saving, rotations and searches of smoothing are left out.
"""

import math
import time
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from bitassay.bench.roofline import matrix_peak
from bitassay.models.precision import fast_in_bf16
from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export.plan import planned_matrices
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.replicas import is_replica
from bitassay.quantization.solvers.registry import matrix_solver
from bitassay.quantization.solvers.solver import Matrices
from bitassay.record.progress import silent

SAMPLE_ROWS, SAMPLE_COLUMNS = 256, 1024
PRODUCT = (512, 1024, 1024)
SOLVING_PASSES = 2.5  # over a layer, to get as far as each of its inputs and to its output


class Duration(NamedTuple):
    """Seconds that work takes, and what that rests on: products in FLOP/s, by dtype, and weights that are
    rounded a second."""

    seconds: float
    products: dict[str, float]
    rounded: float

    def __str__(self) -> str:
        rates = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in self.products.items())
        return (
            f"about {_spoken(self.seconds)}, by what was timed on this machine just now: {rates}, "
            f"{self.rounded / 1e6:.1f} million weights rounded a second; without reading and writing files"
        )


def quantize_seconds(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> Duration:
    """Time products and rounding on `device`, and return what quantizing by `recipe` takes with these. The
    model may be on the meta device."""
    shapes, ways = planned_matrices(model, recipe)
    names = [name for name in ways[0] if not is_replica(name)]
    weights = sum(math.prod(shapes[name]) for name in names)
    solves = recipe.is_calibrated and recipe.uses_calibrated_solver
    schemes = [ways[0][name].scheme for name in names]
    rounded = _rounded_a_second(recipe, max(schemes, key=schemes.count), solves, device)
    seconds = weights / rounded
    fast = "bfloat16" if fast_in_bf16(device) else "float32"
    precision = "float32" if recipe.text.precision is None else fast
    wanted: set[str] = {"float32", *([precision, fast] if recipe.is_calibrated else [])}
    products = {name: rate for name in sorted(wanted) if (rate := matrix_peak(name, device, PRODUCT))}
    if recipe.is_calibrated:
        text = recipe.text
        tokens, samples = text.samples * text.tokens, text.samples
        passes = SOLVING_PASSES if solves else 1
        seconds += 2 * weights * tokens * passes / products[precision]
        learned = sum(part.text_passes(samples) for part in recipe.parts.values())
        seconds += 2 * weights * text.tokens * learned / products[fast]
        if solves:
            inputs = _inputs(model, names)
            columns = [shapes[own[0]][1] for own in inputs.values()]
            flop = sum(tokens * size**2 + 4 / 3 * size**3 for size in columns)
            flop += sum(shapes[name][0] * shapes[name][1] ** 2 for name in names)
            seconds += flop / products["float32"]
    return Duration(seconds, products, rounded)


def _inputs(model: PreTrainedModel, names: list[str]) -> dict[tuple[str, ...], list[str]]:
    """Return matrices by the input that they read: those of a module that do not put out hidden states read
    the same one."""
    prefix = f"{module_name(model, decoder_layers(model))}."
    inputs: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        alone = key.startswith(("o_", "down", "c_proj", "dense", "out_", "fc2", "wo", "w2")) or key.isdigit()
        inputs.setdefault((owner.removeprefix(prefix), key if alone else ""), []).append(name)
    return inputs


@torch.no_grad()
def _rounded_a_second(recipe: Recipe, scheme: WeightScheme, solves: bool, device: torch.device) -> float:
    """Return how many weights are rounded in a second, in a sample matrix after a smaller one."""
    solve, seconds = matrix_solver(recipe), 1.0
    for rows, columns in ((32, SAMPLE_COLUMNS), (SAMPLE_ROWS, SAMPLE_COLUMNS)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator).to(device)
        hessian = torch.eye(columns, device=device, dtype=torch.float32)
        began = time.perf_counter()
        if solves:
            solution = solve(Matrices({"sample": weight}, hessian, scheme, silent))["sample"].tensor
        else:
            solution = quantize_tensor(weight, scheme, "sample")
        solution.scale.sum().item()  # waits for the device
        seconds = time.perf_counter() - began
    return SAMPLE_ROWS * SAMPLE_COLUMNS / seconds


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

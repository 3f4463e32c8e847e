"""What a solver is: how a recipe's part `gptq`, `low_rank`, `learned` or `tune` finds codes that know the
model's inputs. Each is one file and one row of the table in `registry.py`, under the part's name.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.spec import SolverPart
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Hessian, Matrix, Tokens
from bitassay.quantization.solvers.layerwise import Arguments, Hidden
from bitassay.quantization.solvers.shadow_weight import ShadowWeight
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder


@dataclass(frozen=True)
class Solution:
    """A quantized matrix and, where learning goes on, its weights before their last rounding."""

    tensor: QuantizedTensor
    unrounded: Matrix | None = None

    def to(self, device: torch.device) -> "Solution":
        """Return the same on that device."""
        return Solution(self.tensor.to(device), None if self.unrounded is None else self.unrounded.to(device))

    def shadow_weight(self) -> ShadowWeight:
        """Return the weight from which learning starts."""
        assert self.unrounded is not None
        return ShadowWeight(self.tensor.scheme, self.unrounded, self.tensor.grid, self.tensor.low_rank)


class Matrices(NamedTuple):
    """Matrices of one scheme that read the same input, by name; hessian: `sum x x^T` over that input."""

    weights: dict[str, Float[Tensor, "_ in"]]
    hessian: Hessian
    scheme: WeightScheme
    progress: Progress

    @property
    def importance(self) -> Columns:
        """The Hessian's diagonal."""
        return self.hessian.diagonal().float()

    def one_by_one(self) -> "Iterator[tuple[str, Matrix, Matrices]]":
        """Yield name, weight and problem of each matrix by itself, with its own adaptive groups."""
        for name, weight in self.weights.items():
            scheme = adapted(weight, self.scheme, self.importance)
            yield name, weight, self._replace(weights={name: weight}, scheme=scheme)


class Layer(NamedTuple):
    """A decoder layer: its quantized linears, what enters it, and what it puts out unquantized."""

    name: str
    module: nn.Module
    linears: Mapping[str, Solution]
    hidden: Hidden
    targets: Hidden
    arguments: Arguments
    progress: Progress


class Model(NamedTuple):
    """A model whose layers were quantized one by one; linears are full names, layer after layer. A solver
    takes each linear's solution when it goes on from it, so that nothing else holds what it is made of."""

    recipe_name: str
    base: PreTrainedModel
    working_copy: PreTrainedModel
    linears: list[str]
    take: Callable[[str], Solution]
    tokens: Tokens
    folder: RunFolder | None
    progress: Progress


MatrixSolver = Callable[[Matrices], dict[str, Solution]]


@dataclass(frozen=True)
class Solver:
    """What one part of a recipe does. part: the class of its spec; `spec` below is one of these.

    matrices(spec, inner): the function that quantizes matrices, where the parts before it use `inner`.
    layer(spec, layer): better solutions for linears, once their layer was quantized; model(spec, model): once
    all layers were, in their order."""

    part: type[SolverPart]
    matrices: Callable[[Any, MatrixSolver], MatrixSolver] | None = None
    layer: Callable[[Any, Layer], dict[str, Solution]] | None = None
    model: Callable[[Any, Model], Iterator[tuple[str, Solution]]] | None = None


def to_nearest(matrices: Matrices) -> dict[str, Solution]:
    """Round matrices to nearest, errors weighed by the inputs."""
    return {
        name: Solution(quantize_tensor(weight, single.scheme, name, single.importance), weight.float())
        for name, weight, single in matrices.one_by_one()
    }

"""A low-rank correction beside the codes: `W ~ Q + A B`, with two thin factors in 16 bits.

What rounding did to a layer is `(W - Q) x`, so the correction of rank r should make

    || (W - Q - A B) H^(1/2) ||_F^2 = sum over the inputs x of || (W - Q - A B) x ||^2,    H = sum x x^T

small, not its distance from W - Q alone. With R = W - Q, whitening by any root H = L L^T and cutting off the
singular value decomposition R L = U S V^T gives the optimum A = U_r, B = S_r V_r^T L^-1. Since
S_r V_r^T = U_r^T R L, that is

    A = U_r, the first eigenvectors of R H R^T      B = A^T R

where no root is inverted: a singular H needs no special care. A is rounded first, and B is then the best one
for the rounded A, so that only B's own rounding is left.

H is damped by DAMPING times its mean diagonal, as the solvers that round the weights do: directions that the
calibration text never took are corrected last, but before nothing at all. An H that is zero throughout says
nothing about the inputs, and then all directions count alike: the plain decomposition of R.

The factors cost `16 r (out + in)` bits; at rank 16 that is 0.9 bits a weight for a matrix of 576 x 576, and
0.1 for one of 4096 x 4096.

Sources: EoRA (2410.21271, section 3.2), QERA (2410.06040, theorem 1), which both invert the root; alternating
with the rounding: LQ-LoRA (2311.12023, section 3.1), LoftQ (2310.08659).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.models.precision import exact
from bitassay.quantization.codes.tensor import LowRank
from bitassay.quantization.recipe.solvers import LowRankSpec
from bitassay.quantization.shapes import Hessian, Matrix
from bitassay.quantization.solvers.solver import Matrices, MatrixSolver, Solution

DAMPING = 0.01


def solver(spec: LowRankSpec, inner: MatrixSolver) -> MatrixSolver:
    """Return the solver that adds factors to what `inner` makes of each matrix by itself."""

    def solve(matrices: Matrices) -> dict[str, Solution]:
        solutions = {}
        for name, weight, single in matrices.one_by_one():

            def quantize(w: Tensor, name: str = name, single: Matrices = single) -> Solution:
                return inner(single._replace(weights={name: w}))[name]

            solutions[name] = corrected(weight, matrices.hessian, spec, quantize)
        return solutions

    return solve


def correction(
    residual: Matrix,
    hessian: Hessian,
    rank: int,
    dtype: torch.dtype = torch.float16,
    damping: float = DAMPING,
) -> LowRank:
    """Return the factors that leave the least of `residual` in the metric of `hessian`; computed in fp64.
    Raises BitassayError where the rank is larger than the matrix has, or a value is not finite."""
    if rank > min(residual.shape):
        raise BitassayError(
            f"a matrix {list(residual.shape)} has no correction of rank {rank}",
            f"rank: {min(residual.shape)}",
        )
    if not residual.isfinite().all() or not hessian.isfinite().all():
        raise BitassayError(
            "NaN or infinite values have no low-rank correction", "check the calibration data"
        )
    r = exact(residual)
    left = _first_directions(r, _damped(exact(hessian), damping), rank)
    a = left.to(dtype)
    used = a.double()
    b = torch.linalg.solve(used.T @ used, used.T @ r)
    return LowRank(a.contiguous(), b.to(dtype).contiguous()).to(residual.device)


def corrected(
    weight: Matrix, hessian: Hessian, spec: LowRankSpec, quantize: Callable[[Matrix], Solution]
) -> Solution:
    """Return codes and factors together: what `quantize` lost goes into the factors, each further round
    rounds `W - A B` anew, and the best one counts, by the error in the metric of `hessian`."""
    dtype, weight = getattr(torch, spec.dtype), weight.float()
    metric = _damped(exact(hessian), DAMPING)
    solution = quantize(weight)
    if spec.rank == 0:
        return solution
    best, least = None, torch.inf
    for step in range(spec.rounds):
        factors = correction(weight - solution.tensor.dequantize(), hessian, spec.rank, dtype)
        candidate = replace(solution.tensor, low_rank=factors)
        left = exact(weight - candidate.dequantize())
        error = ((left @ metric) * left).sum().item()
        if error < least:
            best, least = candidate, error
        if step + 1 < spec.rounds:
            solution = quantize(weight - factors.product())
    assert best is not None, "finite weights have a finite error"
    return Solution(best, solution.unrounded)


def _damped(hessian: Hessian, damping: float) -> Hessian:
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    return hessian + damping * mean * eye if mean > 0 else eye


def _first_directions(r: Matrix, hessian: Hessian, rank: int) -> Float[Tensor, "out rank"]:
    """The first left singular vectors of `r L`; through whichever side of it is shorter."""
    rows, columns = r.shape
    if rows <= columns:
        return torch.linalg.eigh(r @ hessian @ r.T).eigenvectors[:, rows - rank :].flip(1)
    values, vectors = torch.linalg.eigh(hessian)
    whitened = r @ (vectors * values.clamp(min=0).sqrt())
    right = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, columns - rank :].flip(1)
    return torch.linalg.qr(whitened @ right).Q

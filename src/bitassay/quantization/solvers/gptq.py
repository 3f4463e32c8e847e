"""GPTQ: round a matrix column by column, and let the columns that follow make up for each error.

For a linear `y = W x` the squared error of the output over the calibration inputs is `tr(D H D^T)` with
`D = W - W'` and `H = sum x x^T`: a quadratic form, the same for each row of W. Fixing one column at its
rounded value and minimising over the columns not yet rounded gives the update (2210.17323, eq. 2)

    d = (w_j - w'_j) / [H_F^-1]_jj          W[:, F] -= d [H_F^-1]_j,F

where F are the columns from j on. All the inverses that are needed are rows of one matrix, the upper Cholesky
factor U of H^-1: `[H_F^-1]_j,F = U_jj U_j,F` (section 3.3, step 3). Columns are taken in blocks, so that most
of the update is a matrix product.

    order   `activation`: columns of large `H_jj` first, while many columns are left to make up for them. The
            grids of all groups are then fixed beforehand from the weights as they are (static groups).
            `natural`: from left to right; each group's grid is fixed when its turn comes, from the weights as
            updated until then.
    damping a share of the mean of H's diagonal that is added to the diagonal. Where the Cholesky
            factorisation fails it is multiplied by ten until it succeeds, and the caller is told.

Residual codes are several planes whose sum is the matrix. All planes of a column are rounded at once, and d
is what the last one leaves: the planes mesh into one finer grid as they do without GPTQ. Plane 1 by itself is
the columns updated for that sum, rounded to nearest. With `planes: apart` each plane is GPTQ of what those
before it left: plane 1 is the GPTQ of its bits, and the sum is worse.

Binary planes have no grid, but a few levels for each weight. Columns are rounded to the levels of a fit, and
planes are fitted again to the updated columns; the better of ROUNDS results counts.

A column that no calibration input reached (`H_jj = 0`) is rounded to nearest. Left out: the paper's variant
without groups is granularity `channel`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.models.precision import WITHOUT_FP64, exact
from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.binary import binarize, levels, on_planes
from bitassay.quantization.codes.copies import digit_planes, merged, planes
from bitassay.quantization.codes.grid import Grid, combined, group_bounds, joined
from bitassay.quantization.codes.rounding import nearest, rounded_matrix
from bitassay.quantization.codes.scales import grid_for, matrix_grids
from bitassay.quantization.codes.tensor import QuantizedTensor, on_grid
from bitassay.quantization.recipe.formats import RUN
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Hessian, Matrix
from bitassay.quantization.solvers.layerwise import sums_dtype
from bitassay.quantization.solvers.solver import Matrices, MatrixSolver, Solution

BLOCK_COLUMNS = 128  # columns whose updates are gathered into one product
ROUNDS = 2


def solver(spec: Gptq, _inner: MatrixSolver) -> MatrixSolver:
    """Return the solver that rounds matrices by GPTQ: stacked, where they do not depend on each other."""

    def solve(matrices: Matrices) -> dict[str, Solution]:
        scheme, weights = matrices.scheme, list(matrices.weights.values())
        if scheme.has_planes or scheme.copies is not None or scheme.granularity == "tensor":
            singles = matrices.one_by_one()
            return {name: _alone(name, weight, single, spec) for name, weight, single in singles}
        stacked = torch.cat(weights)
        scheme = adapted(stacked, scheme, matrices.importance)
        rounded = gptq(stacked, matrices.hessian, [scheme], spec)
        _tell(next(iter(matrices.weights)), rounded.damping, matrices, spec)
        stops = list(itertools.accumulate(len(weight) for weight in weights))
        rows = [slice(start, stop) for start, stop in itertools.pairwise([0, *stops])]
        return {
            name: Solution(rounded.tensor(part), rounded.updated[part])
            for name, part in zip(matrices.weights, rows, strict=True)
        }

    return solve


def _alone(name: str, weight: Matrix, matrices: Matrices, spec: Gptq) -> Solution:
    """Solve binary planes, copies, and a matrix with one scale."""
    hessian, scheme, copies = matrices.hessian, matrices.scheme, matrices.scheme.copies
    if scheme.has_planes:
        tensor, updated, _ = gptq_binary(weight, hessian, scheme, spec)
        return Solution(tensor, updated)
    if copies is None:
        schemes = [scheme]
    else:
        schemes = [copies.whole(scheme)] if copies.differ == "digits" else copies.schemes(scheme)
    parts, left, updated = list[QuantizedTensor](), weight.float(), weight.float()
    for together in [schemes] if spec.planes is None else [[plane] for plane in schemes]:
        rounded = gptq(left, hessian, together, spec)
        _tell(name, rounded.damping, matrices, spec)
        parts, updated = [*parts, *planes(rounded.tensor())], rounded.updated
        left = left - rounded.tensor().dequantize()
    if copies is not None and copies.differ == "digits":
        parts = digit_planes(parts[0], scheme)
    return Solution(merged(parts), updated)


def _tell(name: str, damping: float, matrices: Matrices, spec: Gptq) -> None:
    if damping > spec.damping:
        matrices.progress(f"{name}: the Hessian needed damping of {damping:g}")


@dataclass(frozen=True)
class Rounded:
    """What GPTQ makes of a matrix. For each plane: its scheme, codes `[out, in]` and grid, whose tensors are
    `[rows, groups]`. updated: each column as it was when its turn to be rounded came. damping: the share of
    the mean diagonal that was needed."""

    schemes: Sequence[WeightScheme]
    codes: Float[Tensor, "planes out in"]
    grids: list[Grid]
    updated: Matrix
    damping: float

    def tensor(self, rows: slice = slice(None)) -> QuantizedTensor:
        """Return the matrix, or some rows of it, packed."""
        parts = []
        for scheme, codes, grid in zip(self.schemes, self.codes, self.grids, strict=True):
            g = grid if rows == slice(None) else grid.each(lambda part: part[rows])
            parts.append(on_grid(codes[rows], g, scheme))
        return merged(parts)


def gptq(weight: Matrix, hessian: Hessian, schemes: Sequence[WeightScheme], spec: Gptq) -> Rounded:
    """Round `weight` for the inputs whose `sum x x^T` is `hessian`, as a sum of planes, one for each scheme;
    all have one granularity. Rows are independent of each other (granularity `tensor` apart), so matrices
    that read the same input may be stacked."""
    granularity, (rows, columns) = Granularity.parse(schemes[0].granularity), weight.shape
    importance, bounds = hessian.diagonal().float(), group_bounds(granularity, columns)
    group_of = [g for g, (start, stop) in enumerate(bounds) for _ in range(start, stop)]
    static = spec.order == "activation" or granularity.name == "tensor"
    two_levels = schemes[0].number_format.levels is not None
    grids = _static_grids(weight, importance, schemes) if static else [[] for _ in schemes]
    codes = torch.empty(len(schemes), columns, rows, device=weight.device)

    def fix_grids(start: int, stop: int, group: Float[Tensor, "out size"]) -> None:
        if two_levels:  # several groups, whose grids are found together
            for plane, found in zip(
                grids, _static_grids(group, importance[start:stop], schemes), strict=True
            ):
                plane += found
            return
        for plane, scheme in zip(grids, schemes, strict=True):
            plane.append(grid_for(group, scheme, importance[start:stop].expand_as(group)))
            group = group - nearest(group, plane[-1])[1]

    def round_column(j: int, left: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        for plane, plane_grids in enumerate(grids):
            q, value = nearest(left[:, None], plane_grids[group_of[j]])
            codes[plane, j], left = q[:, 0], left - value[:, 0]
        return left

    begin = None if static else fix_grids
    spans = group_bounds(Granularity.parse(f"g{RUN}"), columns) if two_levels else bounds
    updated, damping = _compensated(weight, hessian, importance, spec, round_column, spans, begin)
    shared = [combined(plane, lambda parts: torch.cat(parts, dim=1)) for plane in grids]
    return Rounded(schemes, codes.transpose(1, 2).contiguous(), shared, updated, damping)


def gptq_on_levels(
    weight: Matrix, hessian: Hessian, choices: Float[Tensor, "levels out in"], spec: Gptq
) -> tuple[Matrix, float]:
    """Run GPTQ on levels of each weight. Returns every column as it was at its turn, and the damping."""
    by_column = choices.permute(2, 1, 0).contiguous()

    def round_column(j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        closest = (by_column[j] - column[:, None]).abs().argmin(1, keepdim=True)
        return column - by_column[j].gather(1, closest)[:, 0]

    return _compensated(weight, hessian, hessian.diagonal(), spec, round_column)


def gptq_binary(
    weight: Matrix, hessian: Hessian, scheme: WeightScheme, spec: Gptq
) -> tuple[QuantizedTensor, Matrix, float]:
    """Return a matrix as binary planes, its updated columns, and the damping."""
    best, least, source = None, torch.inf, weight.float()
    for _ in range(ROUNDS):
        planes = binarize(source, scheme, hessian.diagonal().float())
        source, damping = gptq_on_levels(weight, hessian, levels(planes), spec)
        tensor = on_planes(planes, source)
        left = exact(tensor.dequantize() - weight)
        if (error := ((left @ exact(hessian)) * left).sum().item()) < least:
            best, least = (tensor, source, damping), error
    assert best is not None, "finite weights have a finite error"
    return best


def _compensated(
    weight: Matrix,
    hessian: Hessian,
    importance: Columns,
    spec: Gptq,
    round_column: Callable[[int, Float[Tensor, " out"]], Float[Tensor, " out"]],
    bounds: Sequence[tuple[int, int]] = (),
    begin: Callable[[int, int, Float[Tensor, "out size"]], None] | None = None,
) -> tuple[Matrix, float]:
    """Return every column as it was when its turn came, and the damping. `round_column(j, column)` rounds one
    and returns what that leaves over; with `begin`, which is called at the first column of every group,
    columns are taken from left to right."""
    by_activation, columns = spec.order == "activation", len(hessian)
    natural = torch.arange(columns, device=weight.device)
    order = importance.argsort(descending=True) if by_activation else natural
    factor, damping = inverse_factor(hessian, spec.damping, order)
    factor, number = factor.to(weight.device, torch.float32), order.tolist()
    # Column j of the weight is row j here, so that what is read together lies together.
    w = weight.float().T.index_select(0, order)
    for first, last in [(0, columns)] if begin is None else bounds:
        if begin is not None:
            begin(first, last, w[first:last].T.contiguous())
        for start in range(first, last, BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, last)
            block = slice(start, stop)
            errors = _rounded_block(w[block], factor[block, block], number[block], round_column)
            w[stop:].addmm_(factor[block, stop:].T, errors, alpha=-1)
    del factor  # of which no view may be left
    updated = torch.empty(weight.shape, device=weight.device)
    updated.T.index_copy_(0, order, w)
    return updated, damping


def _rounded_block(
    block: Float[Tensor, "size out"],
    factor: Float[Tensor, "size size"],
    numbers: Sequence[int],
    round_column: Callable[[int, Float[Tensor, " out"]], Float[Tensor, " out"]],
) -> Float[Tensor, "size out"]:
    """Round a block's columns one after the other and return their errors, for which the later ones make up
    in place."""
    errors = torch.empty_like(block)
    for j, number in enumerate(numbers):
        u = factor[j]
        errors[j] = round_column(number, block[j]) / u[j]
        block[j + 1 :].addr_(u[j + 1 :], errors[j], alpha=-1)
    return errors


def inverse_factor(
    hessian: Hessian, damping: float, order: Int[Tensor, " in"] | None = None
) -> tuple[Hessian, float]:
    """Return the upper Cholesky factor of `(H + c I)^-1`, columns in `order`, and the share c / mean(diag H)
    it took. In fp64, where a Hessian is so wide that it is not summed in it, only where fp32 fails."""
    if not _is_finite(hessian):
        raise BitassayError("the calibration inputs are not finite", "check the model in a wider dtype")
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    dtypes = dict.fromkeys((sums_dtype(len(hessian)), torch.float64))
    while True:
        for dtype in dtypes:
            factor = _factor(_in_order(hessian, order, dtype), damping)
            if factor is not None:
                return factor, damping
        damping *= 10


def _in_order(hessian: Hessian, order: Int[Tensor, " in"], dtype: torch.dtype) -> Hessian:
    """Return a copy in `dtype`, rows and columns in `order`; on the host, where the device has no fp64."""
    device = torch.device("cpu") if hessian.device.type in WITHOUT_FP64 else hessian.device
    h = torch.empty(hessian.shape, dtype=dtype, device=device)
    for rows, part in zip(order.split(BLOCK_COLUMNS), h.split(BLOCK_COLUMNS), strict=True):
        part.copy_(hessian[rows][:, order])
    return h


def _factor(h: Hessian, damping: float) -> Hessian | None:
    """Return the factor in the memory of `h`, None where there is none."""
    diagonal = h.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    # A column without inputs is on its own: whatever is on its diagonal, it touches no other.
    diagonal.add_((diagonal <= 0) * mean).add_(damping * mean)
    # LAPACK works in place of a matrix that lies column after column, as a symmetric one does transposed.
    h, failed = h.mT, torch.empty((), dtype=torch.int32, device=h.device)
    h, failed = torch.linalg.cholesky_ex(h, out=(h, failed))
    if failed:
        return None
    torch.cholesky_inverse(h, out=h)
    h, failed = torch.linalg.cholesky_ex(h, upper=True, out=(h, failed))
    return None if failed or not _is_finite(h.mT) else h


def _is_finite(matrix: Matrix) -> bool:
    """Return whether all values of a matrix that lies row after row are finite, without another one."""
    return all(bool(bound.isfinite()) for bound in matrix.aminmax())


def _static_grids(weight: Matrix, importance: Columns, schemes: Sequence[WeightScheme]) -> list[list[Grid]]:
    """The grid of every group of columns for each plane, by the weights as they are."""
    granularity, left, planes = Granularity.parse(schemes[0].granularity), weight.float(), []
    for scheme in schemes:
        grids = matrix_grids(left, scheme, importance)
        left = left - rounded_matrix(left, grids, granularity)
        shared = joined(granularity, grids, len(weight))
        groups = range(shared.scale.shape[1])
        planes.append([shared.each(lambda part, g=g: part[:, g : g + 1]) for g in groups])
    return planes

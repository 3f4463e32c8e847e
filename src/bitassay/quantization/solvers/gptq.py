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

Residual codes are several planes whose sum is the matrix, each of what those before it left over. All planes
of a column are rounded at once, and d is what the last one leaves: the error of the sum is what later columns
make up for, and the planes mesh into one finer grid as they do without GPTQ. Plane 1 by itself is the columns
as compensated for that sum, rounded to nearest: nothing makes up for its own errors. With `planes: apart`
each plane is GPTQ of what those before it left, so that plane 1 is the GPTQ of its bits, and the sum worse:
errors that were made up for no longer lie within a step, where the next plane would have its levels.

A column that no calibration input reached (`H_jj = 0`) has no error to make up for and is rounded to nearest.
Left out: the paper's variant without groups is granularity `channel`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.codes.rounding import dequantize, round_to_nearest
from bitassay.quantization.codes.scales import grid_for
from bitassay.quantization.codes.tensor import joined
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme

BLOCK_COLUMNS = 128  # columns whose updates are gathered into one product


class Rounded(NamedTuple):
    """One plane: codes `[out, in]` and their grid, its tensors `[rows, groups]`; compensated: each column as
    it was when its turn to be rounded came, less the planes before; damping: the share of the mean diagonal
    that was needed."""

    codes: Float[Tensor, "out in"]
    grid: Grid
    compensated: Float[Tensor, "out in"]
    damping: float


def gptq(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], scheme: WeightScheme, spec: Gptq
) -> Rounded:
    """Round `weight` for the inputs whose `sum x x^T` is `hessian`. Rows are independent of each other
    (granularity `tensor` apart), so matrices that read the same input may be stacked."""
    [found] = gptq_planes(weight, hessian, [scheme], spec)
    return found


def gptq_planes(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    schemes: Sequence[WeightScheme],
    spec: Gptq,
) -> list[Rounded]:
    """The same as a sum of planes, one for each scheme; all have one granularity."""
    granularity = Granularity.parse(schemes[0].granularity)
    rows, columns = weight.shape
    importance = hessian.diagonal().float()
    by_activation = spec.order == "activation"
    order = importance.argsort(descending=True) if by_activation else torch.arange(columns)
    factor, damping = inverse_factor(hessian[order][:, order], spec.damping)
    factor = factor.float()

    bounds = group_bounds(granularity, columns)
    static = by_activation or granularity.name == "tensor"
    grids = _static_grids(weight, importance, schemes, granularity) if static else [[] for _ in schemes]
    group_of = [g for g, (start, stop) in enumerate(bounds) for _ in range(start, stop)]
    # Column j of the weight is row j here, so that what is read together lies together.
    w = weight.float().T[order].contiguous()
    codes, compensated = torch.empty(2, len(schemes), *w.shape)
    for first, last in [(0, columns)] if static else bounds:
        if not static:  # the group's turn has come
            left = w[first:last].T.contiguous()
            for own, scheme in zip(grids, schemes, strict=True):
                own.append(grid_for(left, scheme, importance[first:last].expand_as(left)))
                left = left - _nearest(left, own[-1], scheme)[1]
        for start in range(first, last, BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, last)
            block, errors = w[start:stop], torch.empty(stop - start, rows)
            for j in range(stop - start):
                column, u = block[j], factor[start + j, start:stop]
                group, left = group_of[order[start + j]], column
                for plane, scheme in enumerate(schemes):
                    q, value = _nearest(left[:, None], grids[plane][group], scheme)
                    codes[plane, start + j], compensated[plane, start + j] = q[:, 0], left
                    left = left - value[:, 0]
                errors[j] = left / u[j]
                block[j + 1 :].addr_(u[j + 1 :], errors[j], alpha=-1)
            w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = order.argsort()
    return [
        Rounded(q[back].T.contiguous(), _beside(own), source[back].T.contiguous(), damping)
        for q, own, source in zip(codes, grids, compensated, strict=True)
    ]


def gptq_on_levels(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    levels: Float[Tensor, "levels out in"],
    spec: Gptq,
) -> tuple[Float[Tensor, "out in"], float]:
    """GPTQ where each weight has levels of its own, fixed beforehand, instead of a grid: every column as it
    was when its turn to be rounded came, and the damping."""
    by_activation = spec.order == "activation"
    order = hessian.diagonal().argsort(descending=True) if by_activation else torch.arange(len(hessian))
    factor, damping = inverse_factor(hessian[order][:, order], spec.damping)
    factor = factor.float()
    w, choices = weight.float().T[order].contiguous(), levels.permute(2, 1, 0)[order]
    columns, rows = w.shape
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block, errors = w[start:stop], torch.empty(stop - start, rows)
        for j in range(stop - start):
            u, of_column = factor[start + j, start:stop], choices[start + j]
            nearest = (of_column - block[j][:, None]).abs().argmin(1, keepdim=True)
            errors[j] = (block[j] - of_column.gather(1, nearest)[:, 0]) / u[j]
            block[j + 1 :].addr_(u[j + 1 :], errors[j], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return w[order.argsort()].T.contiguous(), damping


def inverse_factor(hessian: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """The upper Cholesky factor of `(H + c I)^-1` in fp64, and the share c / mean(diag H) that it took."""
    if not hessian.isfinite().all():
        raise BitassayError("the calibration inputs are not finite", "check the model in a wider dtype")
    h = hessian.double()
    mean = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    # A column without inputs is on its own: whatever is on its diagonal, it touches no other.
    h = h + torch.diag((h.diagonal() <= 0) * mean)
    while True:
        damped = h + damping * mean * torch.eye(len(h), dtype=h.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and factor.isfinite().all():
                return factor, damping
        damping *= 10


def group_bounds(granularity: Granularity, columns: int) -> list[tuple[int, int]]:
    """First column and the one after the last of every group of a row."""
    return [
        (a, a + size) for start, stop, size in granularity.spans(columns) for a in range(start, stop, size)
    ]


def _nearest(
    w: Float[Tensor, "groups size"], grid: Grid, scheme: WeightScheme
) -> tuple[Float[Tensor, "groups size"], Float[Tensor, "groups size"]]:
    """Codes, and what they stand for."""
    codes = round_to_nearest(w, grid, scheme.number_format, scheme.symmetric)
    return codes, dequantize(codes, grid, scheme.number_format)


def _static_grids(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, " in"],
    schemes: Sequence[WeightScheme],
    granularity: Granularity,
) -> list[list[Grid]]:
    """For each plane the grid of every group of columns, from the weights as they are; tensors `[out, 1]`, or
    `[1, 1]`."""
    left, found = granularity.to_groups(weight.float()), []
    weighed = granularity.to_groups(importance.expand(weight.shape))
    for scheme in schemes:
        grids = [grid_for(w, scheme, h) for w, h in zip(left, weighed, strict=True)]
        left = [w - _nearest(w, grid, scheme)[1] for w, grid in zip(left, grids, strict=True)]
        whole = joined(granularity, grids, len(weight))
        found.append([whole.each(lambda part, g=g: part[:, g : g + 1]) for g in range(whole.scale.shape[1])])
    return found


def _beside(grids: list[Grid]) -> Grid:
    """The inverse: the grids of all groups, side by side."""
    scale, zero_point, mean = zip(*(grid.parts for grid in grids), strict=True)
    return grids[0]._replace(
        scale=torch.cat(scale, dim=1),
        zero_point=None if zero_point[0] is None else torch.cat(zero_point, dim=1),
        mean=None if mean[0] is None else torch.cat(mean, dim=1),
    )

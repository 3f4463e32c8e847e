"""Binary planes: one bit a weight, a second one where it counts, and scales for columns as well as rows.

    W' = (m + s B + [in salient columns] s_2 B_2) diag(c)          B, B_2 in {-1, 1}

s and m are one a group (granularity) as in any binary scheme. The second plane B_2 of what the first leaves
over is of the columns whose error `sum_i h_j (W - W')_ij^2` is then largest; h_j is the importance of column
j, a Hessian's diagonal. A bitmap, one bit a column, says which. c, one number a column, costs 16 / out bits a
weight and takes up what scales of long groups cannot.

All parts are refined in turns, each to its optimum while the others are held, so that the error can only
fall (`refined`):

    s, m     the weighted regression of W/c - s_2 B_2 on B
    s_2      the weighted mean of (W/c - m - s B) B_2
    B, B_2   the nearest of the two or four levels
    c        <W, P>_j / <P, P>_j for the columns of P = m + s B + s_2 B_2

Then c, s and m, and s_2 are rounded to the dtype they are stored in, each followed by new codes. The first
plane begins at the exact optimum of one plane. `levels` and `on_planes` are what GPTQ needs of such a tensor.

Residual binarization of salient columns is BiLLM's (2402.04291, section 3.2), alternating refinement with
scales of rows and columns ARB-LLM's (2410.03129, ARB and ARB-RC). Unlike theirs, bits are counted with all
scales and the bitmap, there may be a mean beside column scales, and salience is the measured error instead of
w^2 / [H^-1]^2. Left out: BiLLM's split of the other weights by magnitude, whose mask is one more bit a
weight, and ARB-LLM's variant that fits the scales to calibration inputs.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.grid import as_stored, joined, widened
from bitassay.quantization.codes.packing import pack
from bitassay.quantization.codes.scales import matrix_grids
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix, PerGroup

SWEEPS = 15


class Plane(NamedTuple):
    """Codes `[out, columns]`, and scales and means `[rows, groups]` of the groups that share them."""

    granularity: Granularity
    codes: Float[Tensor, "out columns"]
    scale: PerGroup
    mean: PerGroup | None

    def widened(self, per_group: PerGroup) -> Float[Tensor, "out columns"]:
        """Return each group's number at each of its weights."""
        return widened(self.granularity, per_group, self.codes.shape)

    def summed(self, matrix: Float[Tensor, "out columns"]) -> PerGroup:
        """Return the sum over each group."""
        sums = [group.sum(1, keepdim=True) for group in self.granularity.to_groups(matrix)]
        return self.granularity.from_groups(sums, len(matrix))

    def values(self) -> Float[Tensor, "out columns"]:
        """Return the weights that the plane stands for."""
        weights = self.widened(self.scale) * self.codes
        return weights if self.mean is None else weights + self.widened(self.mean)


class Planes(NamedTuple):
    """`(first + second in the salient columns) diag(column_scale)`; no second plane where none is salient."""

    first: Plane
    second: Plane | None
    salient: Int[Tensor, " salient"]
    column_scale: Columns

    def unscaled(self) -> Matrix:
        """Return the sum of the planes, without column scales."""
        weights = self.first.values()
        if self.second is not None:
            weights = weights.index_add(1, self.salient, self.second.values())
        return weights


def binarize(
    weight: Matrix, scheme: WeightScheme, importance: Columns | None = None, sweeps: int = SWEEPS
) -> QuantizedTensor:
    """Return a matrix as binary planes by `scheme`, its error weighed by the columns' `importance`; a column
    without any counts as little as the least important of the others. Weights must be finite."""
    largest = weight.abs().max().item()
    unit = 2.0 ** math.frexp(largest)[1] if largest else 1.0  # so that no square overflows
    w, h = weight.float() / unit, _positive(importance, weight)
    scheme = adapted(w, scheme, h)
    planes = first_planes(w, scheme, h)
    for _ in range(sweeps):
        planes = refined(planes, w, h, scheme.column_scales)
    return _packed(_rounded(planes, w, h, scheme, unit), scheme, unit)


def levels(tensor: QuantizedTensor) -> Float[Tensor, "levels out in"]:
    """Return the two or four values that each weight may have on the planes of `tensor`; some twice."""
    first, second, salient, c = planes_of(tensor)
    step = first.widened(first.scale)
    middle = torch.zeros_like(step) if first.mean is None else first.widened(first.mean)
    if second is None:
        return torch.stack([middle - step, middle + step]) * c
    finer = torch.zeros_like(step).index_copy(1, salient, second.widened(second.scale))
    return torch.stack([middle + a * step + b * finer for a in (-1, 1) for b in (-1, 1)]) * c


def on_planes(tensor: QuantizedTensor, weight: Matrix) -> QuantizedTensor:
    """Round `weight` to the nearest levels of `tensor`, whose scales stay."""
    planes = planes_of(tensor)
    return _packed(recoded(planes, weight.float() / planes.column_scale), tensor.scheme, 1.0)


def planes_of(tensor: QuantizedTensor) -> Planes:
    """Return the planes that `tensor` stores."""
    grid, c = tensor.grid, tensor.column_scale
    first = Plane(tensor.granularity, tensor.codes(), grid.scale, grid.mean)
    ones = torch.ones(tensor.shape[1], device=tensor.scale.device)
    scales = ones if c is None else c.float()
    if (plane := tensor.residual) is None:
        return Planes(first, None, torch.arange(0, device=ones.device), scales)
    second = Plane(plane.granularity, plane.codes(), plane.grid.scale, None)
    return Planes(first, second, tensor.residual_indices(), scales)


def first_planes(w: Matrix, scheme: WeightScheme, h: Columns) -> Planes:
    """Return the best first plane, and the best second one of what it leaves over; column scales of 1."""
    first = best_plane(w, h, scheme)
    left = w - first.values()
    worst = (left.square().sum(0) * h).argsort(descending=True)
    salient = worst[: scheme.residual_columns(w.shape[1])].sort().values
    second = None
    if len(salient):
        second = best_plane(left[:, salient], h[salient], scheme.residual_scheme)
    return Planes(first, second, salient, torch.ones_like(h))


def best_plane(w: Float[Tensor, "out columns"], h: Float[Tensor, " columns"], scheme: WeightScheme) -> Plane:
    """Return one plane of least error, its scales not rounded."""
    exact, granularity = (
        scheme.model_copy(update={"scale_dtype": "float32"}),
        Granularity.parse(scheme.granularity),
    )
    grid = joined(granularity, matrix_grids(w, exact, h), len(w))
    plane = Plane(granularity, torch.ones_like(w), grid.scale, grid.mean)
    return plane._replace(codes=_sign(w if grid.mean is None else w - plane.widened(grid.mean)))


def refined(planes: Planes, w: Matrix, h: Columns, column_scales: bool) -> Planes:
    """Refine every part once, to its optimum for the others as they are: the error does not rise."""
    target, weighed = w / planes.column_scale, (h * planes.column_scale.square()).expand(w.shape)
    planes = rescaled_second(rescaled_first(planes, target, weighed), target, weighed)
    planes = recoded(planes, target)
    return rescaled_columns(planes, w) if column_scales else planes


def rescaled_first(planes: Planes, target: Matrix, h: Matrix) -> Planes:
    """Regress the first plane's scales and means on its codes, with weights."""
    first, second, salient, _ = planes
    if second is not None:
        target = target.index_add(1, salient, -second.values())
    total, hb = first.summed(h), h * first.codes
    slope = first.summed(hb * target) / total
    if first.mean is None:
        return planes._replace(first=first._replace(scale=slope))
    mean_b, mean_t = first.summed(hb) / total, first.summed(h * target) / total
    variance = 1 - mean_b.square()  # of codes that are -1 or 1
    scale = torch.where(variance > 1e-6, (slope - mean_b * mean_t) / variance, first.scale)
    return planes._replace(first=first._replace(scale=scale, mean=mean_t - scale * mean_b))


def rescaled_second(planes: Planes, target: Matrix, h: Matrix) -> Planes:
    """Regress the second plane's scales on its codes, with weights."""
    first, second, salient, _ = planes
    if second is None:
        return planes
    left, weighed = (target - first.values())[:, salient], h[:, salient]
    scale = second.summed(weighed * second.codes * left) / second.summed(weighed)
    return planes._replace(second=second._replace(scale=scale))


def recoded(planes: Planes, target: Matrix) -> Planes:
    """Give every weight the nearest of the levels that scales and means leave."""
    first, second, salient, _ = planes
    centred = target if first.mean is None else target - first.widened(first.mean)
    scale = first.widened(first.scale)
    codes = _sign(centred * scale)  # a negative scale turns the codes
    if second is None:
        return planes._replace(first=first._replace(codes=codes))
    centred, scale, step = centred[:, salient], scale[:, salient], second.widened(second.scale)
    # For either code of the first plane, the best one of the second: then the better of the two.
    left = [centred - scale, centred + scale]
    other = [_sign(rest * step) for rest in left]
    error = [(rest - code * step).square() for rest, code in zip(left, other, strict=True)]
    up = error[0] <= error[1]
    codes = codes.index_copy(1, salient, torch.where(up, 1.0, -1.0))
    second = second._replace(codes=torch.where(up, other[0], other[1]))
    return planes._replace(first=first._replace(codes=codes), second=second)


def rescaled_columns(planes: Planes, w: Matrix) -> Planes:
    """Fit the scale of every column; unchanged where no positive one is best."""
    p = planes.unscaled()
    best = (w * p).sum(0) / p.square().sum(0)
    return planes._replace(column_scale=torch.where(best > 0, best, planes.column_scale))


def _rounded(planes: Planes, w: Matrix, h: Columns, scheme: WeightScheme, unit: float) -> Planes:
    dtype = getattr(torch, scheme.scale_dtype)
    limit = torch.finfo(dtype).max

    def held(numbers: Tensor, unit: float = unit) -> Tensor:
        return as_stored((numbers * unit).clamp(-limit, limit), dtype) / unit

    c = held(planes.column_scale, 1.0)
    c = torch.where(c > 0, c, 1.0)
    target, weighed = w / c, (h * c.square()).expand(w.shape)
    planes = rescaled_first(recoded(planes._replace(column_scale=c), target), target, weighed)
    first = planes.first
    mean = None if first.mean is None else held(first.mean)
    planes = planes._replace(first=first._replace(scale=held(first.scale.abs()), mean=mean))
    planes = rescaled_second(recoded(planes, target), target, weighed)
    if (second := planes.second) is not None:
        planes = planes._replace(second=second._replace(scale=held(second.scale.abs())))
    return recoded(planes, target)


def _packed(planes: Planes, scheme: WeightScheme, unit: float) -> QuantizedTensor:
    first, second, salient, c = planes
    mean = None if first.mean is None else first.mean * unit
    packed = from_codes(first.codes, first.scale * unit, scheme, mean=mean)
    if scheme.column_scales:
        packed = replace(packed, column_scale=c.to(packed.scale.dtype))
    if second is None:
        return packed
    bitmap = torch.zeros(len(c), dtype=torch.uint8, device=c.device).index_fill(0, salient, 1)
    return replace(
        packed,
        residual=from_codes(second.codes, second.scale * unit, scheme.residual_scheme),
        residual_columns=None if len(salient) == len(c) else pack(bitmap, 1),
    )


def _sign(numbers: Tensor) -> Tensor:
    return torch.where(numbers < 0, -1.0, 1.0)


def _positive(importance: Columns | None, weight: Matrix) -> Columns:
    """Return importances above zero, of at most 1; equal ones where none was given or all are zero."""
    if importance is None or not importance.any():
        return torch.ones(weight.shape[1], device=weight.device)
    relative = (importance / importance.max()).float()
    return torch.where(relative > 1e-12, relative, relative[relative > 1e-12].min())

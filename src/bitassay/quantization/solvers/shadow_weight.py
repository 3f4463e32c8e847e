"""Shadow weights: codes that gradients can move.

A code is a rounded position on the grid. While learning, the position is kept unrounded, as `u`, and every
forward pass rounds it:

    q = clamp(round(u), qmin, qmax)         w' = (q - c) s + m

with `c = z - o`, the position of zero. Gradients pass the rounding as if it were not there (straight through,
1308.3432), and reach everything else exactly:

    dL/du = dL/dw' s            dL/ds = sum of dL/dw' (q - c)
    dL/dc = -s sum of dL/dw'    dL/dm = sum of dL/dw'           sums over the group

Since `u` counts steps, one learning rate suits all matrices, and moving a scale moves the weights with it
instead of changing codes (in LSQ, 1902.08153, both follow from `w / s`). `u` is kept within half a step of
the outermost codes, so that a clipped weight can come back. Scales are rounded to the dtype they are stored
in at each pass: what is learned is what is stored. Zero points stay as they are, except free ones.

Of a table of codes, steps are the average distance between neighbours, and `q` is the nearest of the table.

With two levels of scales (`two_levels.py`), `s = d a` with a the nearest whole number and d in fp16, both
straight through, and minima likewise, so that a group's scale, its minimum, d and e are all learned.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitassay.models.hooks import forwarded
from bitassay.quantization.codes.grid import Grid, group_bounds
from bitassay.quantization.codes.rounding import nearest_in_table
from bitassay.quantization.codes.tensor import LowRank, QuantizedTensor, on_grid
from bitassay.quantization.codes.two_levels import as_half, in_range
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Matrix

ZEROS = 0.25  # steps: a group that is nowhere farther from zero was all zero when its scale was fitted


class ShadowWeight(nn.Module):
    """A matrix whose codes and grid are being learned, from `weight` on `grid` on, its tensors `[out,
    groups]`. Low-rank factors stay as they are.

    u: positions on the grid, `[out, in]`. gain: what the first scales are multiplied by, `[out, groups]`, 1
    at first, so that one learning rate suits all of them. zero: the position of zero. mean: as the grid's;
    of integers, how far the minimum has moved, in first scales. unit_gain: what d and e are multiplied by,
    `[2, out, runs]`.
    """

    def __init__(self, scheme: WeightScheme, weight: Matrix, grid: Grid, low_rank: LowRank | None = None):
        super().__init__()
        self.scheme, self.grid, self.low_rank = scheme, grid, low_rank
        bounds = group_bounds(Granularity.parse(scheme.granularity), weight.shape[1])
        self.groups = [stop - start for start, stop in bounds]
        self.sizes = torch.tensor(self.groups, device=weight.device)
        self.step = grid.format.step
        self.first_scale = grid.scale.float()
        zero = torch.zeros_like(self.first_scale) if grid.zero_point is None else grid.zero_point.float()
        self.zero = nn.Parameter(zero - grid.offset)
        self.gain = nn.Parameter(torch.ones_like(self.first_scale))
        levels, self.unit_gain = scheme.number_format.levels, None
        if levels is not None:
            runs = self.first_scale[:, :: levels.groups]
            self.unit_gain = nn.Parameter(
                torch.ones(2 if levels.minima else 1, *runs.shape, device=runs.device)
            )
        self.mean = None
        if grid.mean is not None:
            mean = grid.mean.float()
            binary = grid.format.kind == "binary"
            self.mean = nn.Parameter(mean.clone() if binary else torch.zeros_like(mean))
        centred = weight.float() if grid.mean is None else weight.float() - self._wide(grid.mean.float())
        positions = centred / self._wide(self.first_scale * self.step) + self._wide(self.zero.detach())
        self.u = nn.Parameter(positions.contiguous())
        # A group of zeros has the scale 1, a step of which would ruin the matrix: it stays as it is.
        distance = (self.u.detach() - self._wide(zero - grid.offset)).abs()
        self.moves = torch.stack([part.amax(1) > ZEROS for part in distance.split(self.groups, 1)], 1)
        self.clamp()

    def _wide(self, per_group: Float[Tensor, "out groups"]) -> Matrix:
        return per_group.repeat_interleave(self.sizes, dim=1, output_size=sum(self.groups))

    def grid_parameters(self) -> list[nn.Parameter]:
        """Return what is learned besides the codes."""
        free = self.zero if self.scheme.zero_point == "free" else None
        return [part for part in (self.gain, free, self.mean, self.unit_gain) if part is not None]

    def tensors(self) -> list[Tensor]:
        """Return all that it is made of, each tensor with memory of its own, but for low-rank factors."""
        self.grid = self.grid.each(_own)
        self.first_scale = _own(self.first_scale)
        held = (self.first_scale, self.moves, *self.grid.tensors)
        return [*self.parameters(), *(each for each in held if each is not None)]

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring `u` back to within half a step of the outermost codes."""
        lowest, highest = self.grid.code_range
        self.u.clamp_(lowest / self.step - 0.499, highest / self.step + 0.499)

    @torch.no_grad()
    def shrink_to_grid(self, share: float) -> None:
        """Keep this share of every position's distance from its code; the codes stay."""
        self.u.lerp_(_rounded(self.u, self.grid), 1 - share)

    def scale(self) -> Float[Tensor, "out groups"]:
        """Return the scales as they will be stored."""
        levels = self.scheme.number_format.levels
        if levels is None:
            return self._stored(self.first_scale * self.gain)
        assert self.grid.unit is not None
        multiples = self.first_scale * self.gain / self.grid.unit
        return self.unit(0) * (multiples + (in_range(multiples, levels) - multiples).detach())

    def unit(self, which: int) -> Float[Tensor, "out groups"]:
        """Return d (0) or e (1) of two levels at each group, as they will be stored."""
        levels, gain = self.scheme.number_format.levels, self.unit_gain
        first = (self.grid.unit, self.grid.mean_unit)[which]
        assert levels is not None
        assert gain is not None
        assert first is not None
        wide = first * gain[which].repeat_interleave(levels.groups, dim=1, output_size=first.shape[1])
        return wide + (as_half(wide, may_be_zero=True) - wide).detach()

    def means(self) -> Float[Tensor, "out groups"]:
        """Return the means as they will be stored."""
        levels, mean = self.scheme.number_format.levels, self.mean
        assert mean is not None
        if self.grid.format.kind == "binary":
            return self._stored(mean)
        assert self.grid.mean is not None
        if levels is None:
            return self._stored(self.grid.mean + mean * self.first_scale)
        assert self.grid.mean_unit is not None
        first = torch.where(self.grid.mean_unit > 0, self.grid.mean_unit, 1)
        multiples = -(self.grid.mean + mean * self.first_scale) / first
        whole = multiples.round().clamp(0, levels.scale_range[1])
        return -self.unit(1) * (multiples + (whole - multiples).detach())

    def _stored(self, exact: Tensor) -> Tensor:
        """Round to the scales' dtype; the gradient passes the rounding."""
        return exact + (exact.to(getattr(torch, self.scheme.scale_dtype)).float() - exact).detach()

    def forward(self) -> Matrix:
        zero = self._stored(self.zero) if self.scheme.zero_point == "free" else self.zero
        scale = self.scale() * self.step
        weight = _OnGrid.apply(self.u, scale, zero, self.moves, self.sizes, self.groups, self.grid)
        if self.mean is not None:
            mean = self.means()
            weight = weight + self._wide(torch.where(self.moves, mean, mean.detach()))
        if self.low_rank is None:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.low_rank.product()

    @torch.no_grad()
    def weight(self) -> Matrix:
        """Return the unrounded weight, from which another `ShadowWeight` goes on."""
        weight = (self.u - self._wide(self.zero)) * self._wide(self.scale() * self.step)
        return weight if self.mean is None else weight + self._wide(self.means())

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """Return what has been learned, packed."""
        zero = None if self.grid.zero_point is None else self.zero + self.grid.offset
        codes = _rounded(self.u, self.grid) * self.step
        grid = self.grid._replace(scale=self.scale(), zero_point=zero)
        if self.mean is not None:
            grid = grid._replace(mean=self.means())
        if self.unit_gain is not None:
            grid = grid._replace(unit=self.unit(0), mean_unit=None if self.mean is None else self.unit(1))
        return replace(on_grid(codes, grid, self.scheme), low_rank=self.low_rank)


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where others share its memory."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _rounded(u: Tensor, grid: Grid) -> Tensor:
    """Return the codes of positions, in steps; binary has the two codes -1 and 1."""
    if grid.format.table is not None:
        return nearest_in_table(u * grid.format.step, grid.format.table).div_(grid.format.step)
    return (
        torch.where(u < 0, -1.0, 1.0) if grid.format.kind == "binary" else u.round().clamp_(*grid.code_range)
    )


@contextmanager
def shadow_linears(model: nn.Module, shadows: Mapping[str, ShadowWeight]) -> Iterator[None]:
    """While this lasts, the linears of those names compute with shadow weights; their hooks stay."""
    linears = {name: model.get_submodule(name) for name in shadows}

    def with_shadow(shadow: ShadowWeight, linear: nn.Module):
        return lambda x: nn.functional.linear(x, shadow(), linear._parameters["bias"])

    forwards = ((linear, with_shadow(shadows[name], linear)) for name, linear in linears.items())
    with forwarded(forwards):  # type: ignore[arg-type]
        yield


class _OnGrid(torch.autograd.Function):
    """`(round(u) - c) s`, straight through the rounding."""

    @staticmethod
    def forward(ctx, u, scale, zero, moves, sizes, groups, grid):  # type: ignore[override]
        columns = u.shape[1]  # known, so that no device is asked for the sum of the sizes
        centred = _rounded(u, grid).sub_(zero.repeat_interleave(sizes, dim=1, output_size=columns))
        ctx.save_for_backward(centred.half(), scale, moves, sizes)
        ctx.groups = groups
        return centred * scale.repeat_interleave(sizes, dim=1, output_size=columns)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        centred, scale, moves, sizes = ctx.saved_tensors
        scale = scale * moves
        wide = scale.repeat_interleave(sizes, dim=1, output_size=centred.shape[1])

        def by_group(x: Tensor) -> Tensor:
            return torch.stack([part.sum(1) for part in x.split(ctx.groups, dim=1)], dim=1)

        of_zero = -scale * by_group(gradient) if ctx.needs_input_grad[2] else None
        of_scale = by_group(gradient * centred)
        return gradient * wide, of_scale, of_zero, None, None, None, None

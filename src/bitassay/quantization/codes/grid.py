"""The grid of a group of weights: what its codes stand for, `w' = (q - z + o) s + m`.

Scales are rounded to the dtype they will be stored in *before* any code is computed, so that the stored
numbers are the ones that were used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.shapes import Matrix

Column = Float[Tensor, "groups 1"]
TENSORS = ("scale", "zero_point", "mean", "unit", "mean_unit")  # fields of a grid


class Grid(NamedTuple):
    """The number format and what groups share. scale > 0 (binary: >= 0; of a table: of either sign);
    zero_point is in steps, a whole number unless it is middle or free; mean is in the unit of the weights;
    offset, in steps, moves the grid; narrow_range leaves out the lowest code. Of a format with two levels,
    unit is what scale, of either sign, is a whole multiple of, and mean_unit what -mean is."""

    format: NumberFormat
    scale: Column
    zero_point: Column | None = None
    mean: Column | None = None
    offset: float = 0.0
    narrow_range: bool = False
    unit: Column | None = None
    mean_unit: Column | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        low, high = self.format.code_range(symmetric=self.zero_point is None and self.mean is None)
        return low + self.narrow_range, high

    @property
    def shift(self) -> tuple[Tensor | None, Tensor | float | None]:
        """`z - o` as whole steps and what is left of them; None for nothing. Whether that is zero throughout
        is not looked at: on a device, the host would wait for the answer."""
        z, offset = self.zero_point, self.offset
        if z is None:
            return None, (-offset or None)
        steps = z.round()
        return steps, z - steps - offset

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What groups share, in the order of TENSORS."""
        return tuple(getattr(self, name) for name in TENSORS)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        """Return the grid with every tensor of it changed in the same way."""
        return combined([self], lambda tensors: change(tensors[0]))


def combined(grids: Sequence[Grid], combine: Callable[[list[Tensor]], Tensor]) -> Grid:
    """Return one grid of several of the same kind: `combine` is called for each of their tensors."""
    columns = zip(TENSORS, zip(*(grid.tensors for grid in grids), strict=True), strict=True)
    return grids[0]._replace(
        **{name: None if parts[0] is None else combine(list(parts)) for name, parts in columns}
    )


def joined(granularity: Granularity, grids: Sequence[Grid], rows: int) -> Grid:
    """Return the grids of all groups as one, its tensors `[rows, groups]`."""
    return combined(grids, lambda parts: granularity.from_groups(parts, rows))


def split(granularity: Granularity, grid: Grid, columns: int) -> list[Grid]:
    """Invert `joined`: return the grids as `granularity.to_groups` orders the groups."""
    parts = {
        name: granularity.scales_to_groups(part, columns)
        for name, part in zip(TENSORS, grid.tensors, strict=True)
        if part is not None
    }
    return [
        grid._replace(**dict(zip(parts, groups, strict=True))) for groups in zip(*parts.values(), strict=True)
    ]


def widened(granularity: Granularity, per_group: Tensor, shape: torch.Size) -> Matrix:
    """Return each group's number (`[rows, groups]`) at each of its weights."""
    groups = granularity.to_groups(torch.empty(shape, device="meta"))
    parts = granularity.scales_to_groups(per_group, shape[1])
    wide = [part.expand(group.shape) for part, group in zip(parts, groups, strict=True)]
    return granularity.from_groups(wide, shape[0])


def group_bounds(granularity: Granularity, columns: int) -> list[tuple[int, int]]:
    """Return the first column and the one after the last of every group of a row."""
    return [
        (a, a + size) for start, stop, size in granularity.spans(columns) for a in range(start, stop, size)
    ]


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` as they will read back from storage."""
    return values.to(dtype).float()


def stored_scale(scale: Column, dtype: torch.dtype, offset: bool = False) -> Column:
    """Return `scale` as it will read back from storage, never 0 and never infinite. A group of zeros gets 1;
    on a grid with an offset, which has no zero, the smallest number there is. Signs stay."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal number
    stored = as_stored(scale.abs().clamp(smallest, info.max), dtype)
    stored = torch.where(scale < 0, -stored, stored)
    return stored if offset else torch.where(scale.abs() > 0, stored, torch.ones_like(stored))

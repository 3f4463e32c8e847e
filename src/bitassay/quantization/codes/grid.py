"""The grid of a group of weights: what its codes are relative to.

Scales are rounded to the dtype they will be stored in *before* any code is computed, so that the stored
numbers are the ones that were used. A group of zeros has the scale 1; with an offset, which leaves no code
for zero, the smallest number that the dtype has.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.recipe.formats import NumberFormat

Column = Float[Tensor, "groups 1"]


class Grid(NamedTuple):
    """What a group shares. scale > 0 (binary: >= 0); zero_point is in steps, a whole number but where it is
    middle or free; mean is in the unit of the weights; offset, in steps, and restricted are the scheme's."""

    scale: Float[Tensor, "groups 1"]
    zero_point: Float[Tensor, "groups 1"] | None = None
    mean: Float[Tensor, "groups 1"] | None = None
    offset: float = 0.0
    restricted: bool = False

    def code_range(self, fmt: NumberFormat, symmetric: bool) -> tuple[int, int]:
        """Smallest and largest integer code."""
        low, high = fmt.code_range(symmetric)
        return low + self.restricted, high

    @property
    def shift(self) -> tuple[Tensor | None, Tensor | float | None]:
        """`z - o` as whole steps and what is left of them; None for nothing."""
        z, offset = self.zero_point, self.offset
        if z is None:
            return None, (-offset or None)
        whole = z.round()
        return whole, (-offset or None) if torch.equal(whole, z) else z - whole - offset

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.scale, self.zero_point, self.mean

    def each(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        """The grid with every tensor of it changed in the same way."""
        _, zero_point, mean = (None if part is None else change(part) for part in self.parts)
        return self._replace(scale=change(self.scale), zero_point=zero_point, mean=mean)


def read_back(values: Column, dtype: torch.dtype) -> Column:
    """`values` as they will read back from storage."""
    return values.to(dtype).float()


def stored(scale: Column, dtype: torch.dtype, offset: bool = False) -> Column:
    """`scale` as it will read back from storage, never 0 and never infinite. Where a group is all zero: 1, or
    on a grid that has no zero, the smallest number there is."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal number
    stored = scale.clamp(smallest, info.max).to(dtype).float()
    return stored if offset else torch.where(scale > 0, stored, torch.ones_like(stored))

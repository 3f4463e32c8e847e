"""Granularity: which weights of a matrix `[out, in]` share a scale.

`tensor`: all of them. `channel`: an output row. `g64`: 64 neighbours along the input dimension of a row;
where 64 does not divide the row, the last group is shorter, exactly, so that no size is ever changed behind
the user's back.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError

# [groups, size]; unnamed, since the members of a list differ in both
Groups = Float[Tensor, "_ _"]


@dataclass(frozen=True)
class Granularity:
    """`group_size` is None for `tensor` and `channel`."""

    name: str
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Granularity":
        """From `tensor`, `channel` or `g` and a positive number."""
        if text in ("tensor", "channel"):
            return cls(text)
        if (found := re.fullmatch(r"g([1-9][0-9]{0,6})", text)) is None:
            raise BitassayError(
                f"unknown granularity {text!r}", "use tensor, channel, or a group size such as g64"
            )
        return cls(text, int(found[1]))

    def spans(self, columns: int) -> list[tuple[int, int, int]]:
        """`(start, stop, size)` of runs of equal groups of a row: the whole ones, then a shorter last one."""
        size = min(self.group_size or columns, columns)
        whole = columns // size * size
        return [(0, whole, size)] + ([(whole, columns, columns - whole)] if whole < columns else [])

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a matrix `[rows, columns]`."""
        if self.name == "tensor":
            return 1, 1
        return rows, sum((stop - start) // size for start, stop, size in self.spans(columns))

    def to_groups(self, matrix: Float[Tensor, "out in"]) -> list[Groups]:
        """The matrix as groups, one tensor for each group size; row by row, left to right."""
        if self.name == "tensor":
            return [matrix.reshape(1, -1)]
        return [matrix[:, start:stop].reshape(-1, size) for start, stop, size in self.spans(matrix.shape[1])]

    def from_groups(self, parts: list[Groups], rows: int) -> Float[Tensor, "out in"]:
        """The inverse of `to_groups`; also joins one number a group into `[rows, groups]` (or `[1, 1]`)."""
        return torch.cat([part.reshape(1 if part.numel() == 1 else rows, -1) for part in parts], dim=1)

    def scales_to_groups(
        self, scales: Float[Tensor, "rows groups"], columns: int
    ) -> list[Float[Tensor, "_ 1"]]:
        """`[rows, groups]` as one column for each tensor that `to_groups` returns."""
        if self.name == "tensor":
            return [scales.reshape(1, 1)]
        counts = [(stop - start) // size for start, stop, size in self.spans(columns)]
        return [part.reshape(-1, 1) for part in scales.split(counts, dim=1)]

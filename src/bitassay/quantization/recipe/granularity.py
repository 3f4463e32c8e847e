"""Granularity: which weights of a matrix `[out, in]` share a scale.

`tensor`: all of them. `channel`: an output row. `g64`: 64 neighbours along the input dimension of a row;
where 64 does not divide the row, the last group is shorter, exactly, so that no size is ever changed behind
the user's back. `adaptive64`: as many groups as with `g64`, of 128, 64 or 32 neighbours (`adaptive.py`); once
they are chosen, `adaptive64/120...` says which for each 128 columns: 0, 1 or 2 halvings.
"""

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.quantization.shapes import Matrix, PerGroup

# [groups, size]; unnamed, since the members of a list differ in both
Groups = Float[Tensor, "_ _"]


@dataclass(frozen=True)
class Granularity:
    """`group_size` is of groups of one size, `block_sizes` of adaptive ones, `digits` of settled ones."""

    name: str
    group_size: int | None = None
    block_sizes: tuple[int, int, int] | None = None
    digits: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Granularity":
        """Parse a name as the top of this file has it. Raises BitassayError for any other text."""
        if text in ("tensor", "channel"):
            return cls(text)
        if match := re.fullmatch(r"g([1-9][0-9]{0,6})", text):
            return cls(text, int(match[1]))
        match = re.fullmatch(r"adaptive([1-9][0-9]{0,6})(?:/([012]+))?", text)
        if match is None or int(match[1]) % 2:
            raise BitassayError(
                f"unknown granularity {text!r}",
                "use tensor, channel, a group size such as g64, or an even average of sizes: adaptive64",
            )
        size = int(match[1])
        return cls(text, block_sizes=(2 * size, size, size // 2), digits=match[2])

    @property
    def is_settled(self) -> bool:
        """Whether it is known which groups there are."""
        return self.block_sizes is None or self.digits is not None

    def blocks(self, columns: int) -> list[tuple[int, int]]:
        """Return the first column and the one after the last of what has a digit in adaptive groups."""
        assert self.block_sizes is not None
        size = self.block_sizes[0]
        return [(start, min(start + size, columns)) for start in range(0, columns, size)]

    def layout_bits(self, columns: int) -> int:
        """Return the bits that it takes to say which adaptive groups a matrix has: five digits a byte."""
        return 0 if self.block_sizes is None else 8 * math.ceil(len(self.blocks(columns)) / 5)

    def spans(self, columns: int) -> list[tuple[int, int, int]]:
        """Return `(start, stop, size)` of runs of equal groups of a row; the last may be a shorter one."""
        if self.block_sizes is None:
            return _runs(0, columns, self.group_size or columns)
        assert self.digits is not None, "adaptive groups that nobody has chosen"
        blocks = self.blocks(columns)
        if len(blocks) != len(self.digits):
            raise BitassayError(
                f"granularity {self.name} is of a matrix of {len(self.digits)} blocks of columns, "
                f"this one has {len(blocks)}",
                f"granularity: {self.name.partition('/')[0]}",
            )
        return [
            run
            for (start, stop), digit in zip(blocks, self.digits, strict=True)
            for run in _runs(start, stop, self.block_sizes[int(digit)])
        ]

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix `[rows, columns]`."""
        if self.name == "tensor":
            return 1, 1
        if not self.is_settled:
            assert self.block_sizes is not None
            return rows, -(-columns // self.block_sizes[1])
        return rows, sum((stop - start) // size for start, stop, size in self.spans(columns))

    def to_groups(self, matrix: Matrix) -> list[Groups]:
        """Cut the matrix into groups row by row, a tensor `[groups, size]` for each run of equal groups."""
        if self.name == "tensor":
            return [matrix.reshape(1, -1)]
        return [matrix[:, start:stop].reshape(-1, size) for start, stop, size in self.spans(matrix.shape[1])]

    def from_groups(self, parts: list[Groups], rows: int) -> Matrix:
        """Invert `to_groups`; also joins one number a group into `[rows, groups]` (or `[1, 1]`)."""
        wide = [part.reshape(1 if part.numel() == 1 else rows, -1) for part in parts]
        return torch.cat(wide, dim=1) if wide[1:] else wide[0].contiguous()

    def scales_to_groups(self, scales: PerGroup, columns: int) -> list[Float[Tensor, "_ 1"]]:
        """Return scales `[rows, groups]` as one column for each tensor that `to_groups` returns."""
        if self.name == "tensor":
            return [scales.reshape(1, 1)]
        counts = [(stop - start) // size for start, stop, size in self.spans(columns)]
        return [part.reshape(-1, 1) for part in scales.split(counts, dim=1)]


def _runs(start: int, stop: int, size: int) -> list[tuple[int, int, int]]:
    size = min(size, stop - start)
    full = start + (stop - start) // size * size
    return [(start, full, size)] + ([(full, stop, stop - full)] if full < stop else [])

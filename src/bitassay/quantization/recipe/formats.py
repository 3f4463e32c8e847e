"""Number formats: what a code means.

A group of weights `w` shares a scale `s` and, where the format is asymmetric, a zero point `z`:

    q  = clamp(round(w / s) + z, qmin, qmax)        round to nearest, ties to even
    w' = (q - z) * s

Integers: symmetric codes use the full two's-complement range, `[-2^(b-1), 2^(b-1) - 1]`; asymmetric ones
`[0, 2^b - 1]`. Ternary is {-1, 0, 1}. Binary is {-1, 1}, `w' = q s`, or with a mean `w' = q s + m`. FP8 codes
are the values of torch's own dtypes: e4m3fn, which has no infinity, up to 448; e5m2 up to 57344.

The K types of llama.cpp have two levels of scales (`TwoLevels`): q4_k is int4 in groups of 32 whose scales
and minima are whole multiples, of six bits, of two fp16 numbers that 256 weights share. Codes of IQ4
types are the 16 values of NONLINEAR, closer to each other around zero: iq4_nl has a scale, of either sign,
for 32 weights, iq4_xs two levels of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from bitassay.registry import Registry

RUN = 256  # weights of a row that share the upper level of scales
TABLE_GROUP = 32  # weights that share a scale of codes of a table
# kvalues_iq4nl of ggml
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class TwoLevels:
    """Scales of groups of `group` weights in whole multiples of what RUN weights share, d and e:

    minima      w' = d a q - e b    a = 1 ... 2^bits - 1, b = 0 ... 2^bits - 1, q = 0 ...
    otherwise   w' = d a q          a = -2^(bits-1) ... 2^(bits-1) - 1 without 0, q on both sides of 0
    """

    group: int
    bits: int
    minima: bool

    @property
    def groups(self) -> int:
        """Return how many groups share d and e."""
        return RUN // self.group

    @property
    def scale_range(self) -> tuple[int, int]:
        """Return the least and the largest a."""
        half = 2 ** (self.bits - 1)
        return (1, 2 * half - 1) if self.minima else (-half, half - 1)


@dataclass(frozen=True)
class NumberFormat:
    """`bits` is what one code takes when packed (ternary: five codes to a byte). levels: of the K types and
    iq4_xs. table: what the codes are, of a format that is none of whole steps, in order."""

    name: str
    kind: Literal["integer", "ternary", "binary", "float", "table"]
    bits: float
    float_dtype: torch.dtype | None = None
    levels: TwoLevels | None = None
    table: tuple[int, ...] | None = None

    @property
    def has_asymmetric(self) -> bool:
        """Whether codes may be shifted by a zero point (integers) or a mean (binary)."""
        return self.kind in ("integer", "binary")

    @property
    def fixed_group(self) -> int | None:
        """Return how many weights share a scale of a type that leaves no choice of it; None for others."""
        if self.levels is not None:
            return self.levels.group
        return None if self.table is None else TABLE_GROUP

    @property
    def step(self) -> int:
        """Return what codes are apart, on average over a table."""
        return 1 if self.table is None else (self.table[-1] - self.table[0]) // (len(self.table) - 1)

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        """Return the smallest and the largest code; not for float formats."""
        if self.table is not None:
            return self.table[0], self.table[-1]
        if self.kind == "integer":
            levels = 2 ** int(self.bits)
            return (-levels // 2, levels // 2 - 1) if symmetric else (0, levels - 1)
        assert self.kind in ("ternary", "binary")
        return -1, 1

    @property
    def largest(self) -> float:
        """The largest magnitude that a scale of one represents on both sides of zero."""
        if self.float_dtype is not None:
            return torch.finfo(self.float_dtype).max
        return float(self.code_range(symmetric=True)[1])


_FLOATS = (
    NumberFormat("fp8_e4m3", "float", 8, torch.float8_e4m3fn),
    NumberFormat("fp8_e5m2", "float", 8, torch.float8_e5m2),
)
# Installed packages add theirs by entry points in the group `bitassay.formats`.
FORMATS: Registry[NumberFormat] = Registry(
    "formats",
    {
        fmt.name: fmt
        for fmt in (
            *(NumberFormat(f"int{bits}", "integer", bits) for bits in (8, 5, 4, 3, 2)),
            NumberFormat("ternary", "ternary", 1.6),
            NumberFormat("binary", "binary", 1),
            *_FLOATS,
            NumberFormat("q2_k", "integer", 2, levels=TwoLevels(16, 4, minima=True)),
            NumberFormat("q3_k", "integer", 3, levels=TwoLevels(16, 6, minima=False)),
            NumberFormat("q4_k", "integer", 4, levels=TwoLevels(32, 6, minima=True)),
            NumberFormat("q5_k", "integer", 5, levels=TwoLevels(32, 6, minima=True)),
            NumberFormat("q6_k", "integer", 6, levels=TwoLevels(16, 8, minima=False)),
            NumberFormat("iq4_nl", "table", 4, table=NONLINEAR),
            NumberFormat("iq4_xs", "table", 4, levels=TwoLevels(32, 6, minima=False), table=NONLINEAR),
        )
    },
)
INPUT_FORMATS = {
    fmt.name: fmt for fmt in (*(NumberFormat(f"int{b}", "integer", b) for b in (16, 8, 6, 4)), *_FLOATS)
}

"""Number formats: what a code means.

A group of weights `w` shares a scale `s` and, where the format is asymmetric, a zero point `z`:

    q  = clamp(round(w / s) + z, qmin, qmax)        round to nearest, ties to even
    w' = (q - z) * s

Integers: symmetric codes use the full two's-complement range, `[-2^(b-1), 2^(b-1) - 1]`; asymmetric ones
`[0, 2^b - 1]`. Ternary is {-1, 0, 1}. Binary is {-1, 1}, `w' = q s`, or with a mean `w' = q s + m`. FP8 codes
are the values of torch's own dtypes: e4m3fn, which has no infinity, up to 448; e5m2 up to 57344.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from bitassay.registry import Registry


@dataclass(frozen=True)
class NumberFormat:
    """`bits` is what one code takes when packed (ternary: five codes to a byte)."""

    name: str
    kind: Literal["integer", "ternary", "binary", "float"]
    bits: float
    float_dtype: torch.dtype | None = None

    @property
    def has_asymmetric(self) -> bool:
        """Whether codes may be shifted by a zero point (integers) or a mean (binary)."""
        return self.kind in ("integer", "binary")

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        """Return the smallest and the largest integer code; not for float formats."""
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
            *(NumberFormat(f"int{bits}", "integer", bits) for bits in (8, 4, 3, 2)),
            NumberFormat("ternary", "ternary", 1.6),
            NumberFormat("binary", "binary", 1),
            *_FLOATS,
        )
    },
)
INPUT_FORMATS = {
    fmt.name: fmt for fmt in (*(NumberFormat(f"int{b}", "integer", b) for b in (16, 8, 6, 4)), *_FLOATS)
}

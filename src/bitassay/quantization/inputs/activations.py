"""Activations: what the input of a linear is rounded to before it meets the weights.

    q  = clamp(round(x / s) + z, qmin, qmax)        x' = (q - z) s        y = x' W'^T + b

    scale   `dynamic`: each token has its own s (and z), from the largest magnitude (asymmetric: the range) in
            that token. Otherwise one s for the linear, from calibration text (`thresholds.py`). Either is
            multiplied by `scale_factor`, which clips (below 1) or leaves room.
    outliers  columns of the input that stay in the model's own 16 bits and meet the same weights there, as
            in LLM.int8() (2208.07339, section 3). There a column is an outlier of one batch; here it is one
            of the calibration text, so that what becomes of a token never depends on its neighbours:

                sigma: k         columns with max |x_j| > k times the standard deviation of all inputs
                percentile: p    columns whose max |x_j| is above that percentile of all columns' maxima

Integers as in `formats.py`; int16 and int6 exist for inputs only. Arithmetic is in fp32 and x' is rounded to
the model's dtype. Left out: groups within a token, and inputs of attention's own two products (the cache's
side of those is `kv_cache.py`).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict
from torch import Tensor

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.codes.rounding import dequantize, round_to_nearest
from bitassay.quantization.codes.scales import absmax_grid, rescaled
from bitassay.quantization.recipe.formats import INPUT_FORMATS, NumberFormat


@dataclass(frozen=True)
class InputRounding:
    """A scheme as one linear carries it out. scale and the whole zero_point are None where each token has
    its own, whose scale is then multiplied by scale_factor; outliers are columns, in order. Several copies
    are as many grids, evenly over a step around the usual one: the input is rounded on that of `copy`, or
    where that is None becomes the mean of all. Raises ValueError for what fits no scheme."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=False)

    format: str
    symmetric: bool = True
    scale: float | None = None
    zero_point: int | None = None
    outliers: tuple[int, ...] = ()
    copies: int = 1
    copy: int | None = None
    scale_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in INPUT_FORMATS:
            raise ValueError(f"unknown input format {self.format!r}")
        if self.scale is not None and not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"a scale of {self.scale}")
        if not 0 < self.scale_factor < math.inf or (self.scale is not None and self.scale_factor != 1):
            raise ValueError(f"{self.scale_factor} times a scale of {self.scale}")
        if (self.zero_point is not None) != (self.scale is not None and not self.symmetric):
            raise ValueError("a zero point belongs to an asymmetric grid with a scale")
        if self.zero_point is not None:
            low, high = self.number_format.code_range(self.symmetric)
            if not low <= self.zero_point <= high:
                raise ValueError(f"a zero point of {self.zero_point}")
        if list(self.outliers) != sorted({column for column in self.outliers if column >= 0}):
            raise ValueError("outlier columns are not in order")
        if not 1 <= self.copies <= 16 or not 0 <= (self.copy or 0) < self.copies:
            raise ValueError(f"copy {self.copy} of {self.copies}")
        if self.number_format.kind == "float" and self.copies > 1:
            raise ValueError(f"{self.format} has no step that a grid could be moved by")

    @property
    def number_format(self) -> NumberFormat:
        return INPUT_FORMATS[self.format]

    def __str__(self) -> str:
        sign = "" if self.symmetric else " asymmetric"
        which = "per token" if self.scale is None else f"scale {self.scale:.4g}"
        if self.scale_factor != 1:
            which += f" times {self.scale_factor:g}"
        kept = f", {len(self.outliers)} columns in 16 bits" if self.outliers else ""
        which_grid = "the mean" if self.copy is None else f"number {self.copy}"
        several = f", {which_grid} of {self.copies} grids" if self.copies > 1 else ""
        return f"{self.format}{sign} inputs {which}{kept}{several}"


class Codes(NamedTuple):
    """Rounded inputs: codes as fp32 numbers, in outlier columns those of 0; a grid a token or one for all."""

    codes: Float[Tensor, "tokens in"]
    grid: Grid


def input_codes(x: Float[Tensor, "tokens in"], rounding: InputRounding) -> Codes:
    """Return the codes and the grid of each token's input."""
    fmt, x, zero_point = rounding.number_format, x.float(), rounding.zero_point
    if rounding.outliers:
        x = x.masked_fill(outlier_mask(rounding, x), 0)
    if rounding.scale is None:
        grid = absmax_grid(x, fmt, rounding.symmetric, torch.float32)
        grid = rescaled(grid, rounding.scale_factor, torch.float32)
    else:
        zero = None if zero_point is None else x.new_full((1, 1), zero_point)
        grid = Grid(fmt, x.new_full((1, 1), rounding.scale), zero)
    grid = grid._replace(offset=((rounding.copy or 0) + 0.5) / rounding.copies - 0.5)
    return Codes(round_to_nearest(x, grid), grid)


def rounded_inputs(x: Float[Tensor, "... in"], rounding: InputRounding) -> Float[Tensor, "... in"]:
    """Return what the codes stand for, in the dtype of `x`, NaN for a token that is not finite."""
    tokens, rounded = x.reshape(-1, x.shape[-1]), torch.zeros((), device=x.device)
    copies = range(rounding.copies) if rounding.copy is None else [rounding.copy]
    for copy in copies:
        rounded = rounded + dequantize(*input_codes(tokens, replace(rounding, copy=copy))) / len(copies)
    rounded = rounded + undefined(tokens)
    if rounding.outliers:
        rounded = torch.where(outlier_mask(rounding, tokens), tokens.float(), rounded)
    return rounded.to(x.dtype).view(x.shape)


def undefined(tokens: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens 1"]:
    """Return NaN for a token with an input that is not finite, else 0: no code stands for NaN."""
    return tokens.float().abs().amax(-1, keepdim=True) * 0


def outlier_mask(rounding: InputRounding, x: Float[Tensor, "tokens in"]) -> Bool[Tensor, " in"]:
    """Return which columns stay in 16 bits."""
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    mask[list(rounding.outliers)] = True
    return mask

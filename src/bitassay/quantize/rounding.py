"""Weights to codes and back, for groups that share a grid; in fp32, whatever the model's dtype."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantize.formats import NumberFormat

if TYPE_CHECKING:
    from bitassay.quantize.scales import Grid


def round_to_nearest(
    w: Float[Tensor, "groups size"], grid: "Grid", fmt: NumberFormat, symmetric: bool
) -> Float[Tensor, "groups size"]:
    """Codes as fp32 numbers: whole numbers, or FP8 values for float formats."""
    if fmt.kind == "binary":
        centred = w if grid.mean is None else w - grid.mean
        return torch.where(centred < 0, -1.0, 1.0)
    scaled = w / grid.scale
    if fmt.float_dtype is not None:
        # e4m3fn has no infinity: without the clamp torch turns what is too large into NaN.
        return scaled.clamp_(-fmt.largest, fmt.largest).to(fmt.float_dtype).float()
    codes = scaled.round_()
    if grid.zero_point is not None:
        codes += grid.zero_point
    return codes.clamp_(*fmt.code_range(symmetric))


def dequantize(
    codes: Float[Tensor, "groups size"], grid: "Grid", fmt: NumberFormat
) -> Float[Tensor, "groups size"]:
    """`(q - z) * s`, or `q * s + m` where the grid has a mean."""
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    weights = codes * grid.scale
    return weights if grid.mean is None else weights + grid.mean

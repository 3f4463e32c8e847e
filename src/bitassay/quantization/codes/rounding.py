"""Weights to codes and back, in fp32, whatever the model's dtype.

    nearest     q = clamp(round(w/s - o + z)); ties to even
    stochastic  w/s is rounded up with the probability of its fractional part: right on average over the
                seeds, at twice the squared error. Binary: 1 with probability (1 + (w - m)/s) / 2
    feedback    the error of each weight is added to the next one of its row ("bias-aware" rounding, error
                diffusion): the sum of a row, its answer to a constant input, is off by half a step at most
                where nothing is clipped, instead of by a random walk of errors. What is carried is at most
                half a step: a clipped weight would otherwise smear over all that follow
    noise       w + nu s N(0, 1) is rounded in place of w: an ablation, which only adds error

Each is a baseline for rounding that looks at the inputs (`gptq.py`, `learned.py`). Left out: feedback weighed
by the mean input of each column.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.recipe.formats import NumberFormat


def round_to_nearest(
    w: Float[Tensor, "groups size"], grid: Grid, fmt: NumberFormat, symmetric: bool
) -> Float[Tensor, "groups size"]:
    """Codes as fp32 numbers: whole numbers, or FP8 values for float formats."""
    if fmt.kind == "binary":
        centred = w if grid.mean is None else w - grid.mean
        return torch.where(centred < 0, -1.0, 1.0)
    scaled = w / grid.scale
    if fmt.float_dtype is not None:
        # e4m3fn has no infinity: without the clamp torch turns what is too large into NaN.
        return scaled.clamp_(-fmt.largest, fmt.largest).to(fmt.float_dtype).float()
    # Whole steps are added after the rounding, so that ties are even in w/s, as other tools have them.
    whole, part = grid.shift
    if part is not None:
        scaled += part
    codes = scaled.round_()
    if whole is not None:
        codes += whole
    return codes.clamp_(*grid.code_range(fmt, symmetric))


def round_stochastically(
    w: Float[Tensor, "groups size"],
    grid: Grid,
    fmt: NumberFormat,
    symmetric: bool,
    generator: torch.Generator,
) -> Float[Tensor, "groups size"]:
    """Codes whose expectation is `w`, but for what the range clips."""
    chance = torch.rand(w.shape, generator=generator).to(w.device)
    if fmt.kind == "binary":
        centred = w if grid.mean is None else w - grid.mean
        # A scale of zero leaves 0/0 or w/0: there both codes stand for the same weight.
        up = (1 + centred / grid.scale) / 2 > chance
        return torch.where(up, 1.0, -1.0)
    whole, part = grid.shift
    scaled = w / grid.scale + chance
    if part is not None:
        scaled += part
    codes = scaled.floor_()
    return (codes if whole is None else codes + whole).clamp_(*grid.code_range(fmt, symmetric))


def round_with_feedback(
    w: Float[Tensor, "out in"], grid: Grid, fmt: NumberFormat, symmetric: bool
) -> Float[Tensor, "out in"]:
    """Codes column by column, each row carrying its error along. `grid` has an entry for every weight."""
    carried, codes = torch.zeros(len(w), 1, device=w.device), torch.empty_like(w)
    for j in range(w.shape[1]):
        own = grid.each(lambda part, j=j: part[:, j : j + 1])
        wanted = w[:, j : j + 1] + carried
        q = codes[:, j : j + 1] = round_to_nearest(wanted, own, fmt, symmetric)
        half = own.scale if fmt.kind == "binary" else own.scale / 2  # its codes are two scales apart
        carried = (wanted - dequantize(q, own, fmt)).clamp(-half, half)
    return codes


def noisy(
    w: Float[Tensor, "groups size"], grid: Grid, nu: float, generator: torch.Generator
) -> Float[Tensor, "groups size"]:
    """`w + nu s N(0, 1)`."""
    return w + nu * grid.scale * torch.randn(w.shape, generator=generator).to(w.device)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Randomness of one matrix: another for every name, the same in every run and on every device."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def dequantize(
    codes: Float[Tensor, "groups size"], grid: Grid, fmt: NumberFormat
) -> Float[Tensor, "groups size"]:
    """`(q - z + o) s`, or `q s + m` where the grid has a mean."""
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    if grid.offset:
        codes = codes + grid.offset
    weights = codes * grid.scale
    return weights if grid.mean is None else weights + grid.mean

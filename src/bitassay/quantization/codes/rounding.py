"""Weights to codes and back, in fp32, whatever the model's dtype.

    nearest     q = clamp(round(w/s - o + z)); ties to even
    stochastic  w/s is rounded up with the probability of its fractional part: right on average over the
                seeds, at twice the squared error. Binary: 1 with probability (1 + (w - m)/s) / 2
    feedback    the error of each weight is added to the next one of its row ("bias-aware" rounding, error
                diffusion), at most half a step of it: the sum of a row is off by half a step where nothing
                is clipped
    noise       w + nu s N(0, 1) is rounded in place of w: an ablation, which only adds error

Each is a baseline for rounding that looks at the inputs (`solvers/`). Left out: feedback weighed by the mean
input of each column.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.grid import Grid
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.shapes import Matrix

Groups = Float[Tensor, "groups size"]


def dequantize(codes: Groups, grid: Grid) -> Groups:
    """Return `(q - z + o) s`, or `q s + m` where the grid has a mean."""
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    if grid.offset:
        codes = codes + grid.offset
    weights = codes * grid.scale
    return weights if grid.mean is None else weights + grid.mean


def dequantize_(codes: Groups, grid: Grid) -> Groups:
    """Do as `dequantize` does in place of fp32 codes: of a whole matrix, memory is what takes time."""
    if grid.zero_point is not None:
        codes -= grid.zero_point
    if grid.offset:
        codes += grid.offset
    codes *= grid.scale
    if grid.mean is not None:
        codes += grid.mean
    return codes


def round_to_nearest(w: Groups, grid: Grid) -> Groups:
    """Return codes as fp32 numbers: whole numbers (of a table, its own), or FP8 values for float formats."""
    if grid.format.kind == "binary":
        centred = w if grid.mean is None else w - grid.mean
        return torch.where(centred < 0, -1.0, 1.0)
    scaled = (w if grid.mean is None else w - grid.mean) / grid.scale
    if grid.format.float_dtype is not None:
        # e4m3fn has no infinity: without the clamp torch turns what is too large into NaN.
        return scaled.clamp_(-grid.format.largest, grid.format.largest).to(grid.format.float_dtype).float()
    if grid.format.table is not None:
        return nearest_in_table(scaled, grid.format.table)
    # Whole steps are added after the rounding, so that ties are even in w/s, as other tools have them.
    steps, part = grid.shift
    if part is not None:
        scaled += part
    codes = scaled.round_()
    if steps is not None:
        codes += steps
    return codes.clamp_(*grid.code_range)


def nearest_in_table(x: Float[Tensor, "*shape"], table: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Return the number of an ordered table that is nearest to each; of two equally near ones the smaller."""
    values = torch.tensor(table, dtype=torch.float32, device=x.device)
    places = torch.bucketize(x, (values[1:] + values[:-1]) / 2)
    return values.index_select(0, places.view(-1)).view(x.shape)


def nearest(w: Groups, grid: Grid) -> tuple[Groups, Groups]:
    """Return codes rounded to nearest, and the weights that they stand for."""
    codes = round_to_nearest(w, grid)
    return codes, dequantize(codes, grid)


def rounded_matrix(w: Matrix, grids: list[Grid], granularity: Granularity) -> Matrix:
    """Return a matrix rounded to nearest; `grids` are as `granularity.to_groups` orders the groups."""
    groups = zip(granularity.to_groups(w), grids, strict=True)
    return granularity.from_groups([nearest(group, grid)[1] for group, grid in groups], len(w))


def round_stochastically(w: Groups, grid: Grid, generator: torch.Generator) -> Groups:
    """Return codes whose expectation is `w`, except where the range clips."""
    chance = torch.rand(w.shape, generator=generator).to(w.device)
    if grid.format.kind == "binary":
        centred = w if grid.mean is None else w - grid.mean
        # A scale of zero leaves 0/0 or w/0: there both codes stand for the same weight.
        return torch.where((1 + centred / grid.scale) / 2 > chance, 1.0, -1.0)
    steps, part = grid.shift
    scaled = (w if grid.mean is None else w - grid.mean) / grid.scale + chance
    if part is not None:
        scaled += part
    codes = scaled.floor_()
    return (codes if steps is None else codes + steps).clamp_(*grid.code_range)


def round_with_feedback(w: Matrix, grid: Grid) -> Matrix:
    """Return codes, column by column, each row carrying its error along. `grid` has an entry a weight."""
    carried, codes = torch.zeros(len(w), 1, device=w.device), torch.empty_like(w)
    for j in range(w.shape[1]):
        column = grid.each(lambda part, j=j: part[:, j : j + 1])
        wanted = w[:, j : j + 1] + carried
        codes[:, j : j + 1], rounded = nearest(wanted, column)
        step = column.scale.abs()
        half = step if grid.format.kind == "binary" else step / 2  # codes two scales apart
        carried = (wanted - rounded).clamp(-half, half)
    return codes


def with_noise(w: Groups, grid: Grid, nu: float, generator: torch.Generator) -> Groups:
    """Return `w + nu s N(0, 1)`."""
    return w + nu * grid.scale * torch.randn(w.shape, generator=generator).to(w.device)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return the randomness of one matrix, by its name; the same in every run and on every device."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

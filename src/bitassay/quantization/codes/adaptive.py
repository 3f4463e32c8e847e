"""Adaptive groups: smaller groups where they save most error, at as many groups as before.

A row is cut into blocks of `2 G` columns. In each block, for all rows alike, groups have `2 G`, `G` or
`G / 2` columns, so that there are as many groups in all as with groups of `G`. The choice of least error

    min sum_b E_b(d_b)     with     sum_b n_b(d_b) = ceil(in / G)

is found exactly: E_b(d) is the squared error of block b, weighed by importance, rounded to nearest with
groups of size d; n_b(d) is its number of groups; the sum is built up block by block over all numbers of
groups. Groups get small where weights vary, or where inputs are large. What is kept is a digit a block, five
to a byte, for the whole matrix; `stored_bits` counts it.

All rows have the same groups, so that solvers which go column by column (`gptq.py`) need not know. Without
importance there is nothing to gain where columns vary alike over all rows; weighed by the inputs there is a
little (`benchmarks/formats.py`). Left out: groups of
its own for every row, whose digits would cost 0.8 bits for every G weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.quantization.codes.rounding import dequantize, round_to_nearest
from bitassay.quantization.codes.scales import grid_for
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme


def adapted(
    weight: Float[Tensor, "out in"],
    scheme: WeightScheme,
    importance: Float[Tensor, " in"] | None = None,
) -> WeightScheme:
    """`scheme` with the groups that suit `weight` best; as it is, where its granularity is fixed already."""
    granularity = Granularity.parse(scheme.granularity)
    if granularity.is_settled:
        return scheme
    columns, sizes = weight.shape[1], granularity.block_sizes
    assert sizes is not None
    blocks = granularity.blocks(columns)
    errors = [column_errors(weight, scheme.with_granularity(f"g{size}"), importance) for size in sizes]
    costs = [[float(error[start:stop].sum()) for error in errors] for start, stop in blocks]
    counts = [[-(-(stop - start) // size) for size in sizes] for start, stop in blocks]
    digits = cheapest(costs, counts, granularity.scale_shape(1, columns)[1])
    return scheme.with_granularity(granularity.name + "/" + "".join(map(str, digits)))


def column_errors(
    weight: Float[Tensor, "out in"], scheme: WeightScheme, importance: Float[Tensor, " in"] | None
) -> Float[Tensor, " in"]:
    """The squared error of every column, weighed by importance, rounded to nearest."""
    granularity, fmt, w = Granularity.parse(scheme.granularity), scheme.number_format, weight.float()
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance.float()
    parts = []
    for group, weighed in zip(
        granularity.to_groups(w), granularity.to_groups(h.expand(w.shape)), strict=True
    ):
        grid = grid_for(group, scheme, None if importance is None else weighed)
        codes = round_to_nearest(group, grid, fmt, scheme.symmetric)
        parts.append((dequantize(codes, grid, fmt) - group).square_().mul_(weighed))
    return granularity.from_groups(parts, len(w)).sum(0)


def cheapest(costs: list[list[float]], counts: list[list[int]], total: int) -> list[int]:
    """One choice a block, so that `counts` add up to `total`, at the least sum of `costs`; of equally cheap
    ones the one that leaves the groups as they are."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for cost, count in zip(costs, counts, strict=True):
        following: dict[int, tuple[float, list[int]]] = {}
        for used, (spent, digits) in best.items():
            for digit in (1, 0, 2):
                sum_, now = spent + cost[digit], used + count[digit]
                if now <= total and (now not in following or sum_ < following[now][0]):
                    following[now] = (sum_, [*digits, digit])
        best = following
    return best[total][1]

"""Adaptive groups: smaller groups where they save most error, at as many groups as before.

A row is cut into blocks of `2 G` columns. In each block, for all rows alike, groups have `2 G`, `G` or
`G / 2` columns, so that there are as many groups in all as with groups of `G`. The choice of least error

    min sum_b E_b(d_b)     with     sum_b n_b(d_b) = ceil(in / G)

is found exactly, built up block by block over all numbers of groups: E_b(d) is the squared error of block b,
weighed by importance, rounded to nearest with groups of size d; n_b(d) is its number of groups. A digit a
block, five to a byte, is stored for the whole matrix; `stored_bits` counts it.

All rows have the same groups, so that solvers which go column by column need not know. Left out: groups of
its own for every row, whose digits would cost 0.8 bits for every G weights.
"""

import torch

from bitassay.quantization.codes.rounding import rounded_matrix
from bitassay.quantization.codes.scales import matrix_grids
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix


def adapted(weight: Matrix, scheme: WeightScheme, importance: Columns | None = None) -> WeightScheme:
    """Return `scheme` with the groups that suit `weight` best; unchanged where its granularity is fixed."""
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


def column_errors(weight: Matrix, scheme: WeightScheme, importance: Columns | None) -> Columns:
    """Return the squared error of every column, weighed by importance, rounded to nearest."""
    granularity, w = Granularity.parse(scheme.granularity), weight.float()
    grids = matrix_grids(w, scheme, importance)
    squares = (rounded_matrix(w, grids, granularity) - w).square_()
    return (squares if importance is None else squares.mul_(importance.float())).sum(0)


def cheapest(costs: list[list[float]], counts: list[list[int]], total: int) -> list[int]:
    """Return one choice a block at the least sum of `costs`, whose `counts` sum to `total`; of equals, 1."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for cost, count in zip(costs, counts, strict=True):
        extended: dict[int, tuple[float, list[int]]] = {}
        for groups, (error, digits) in best.items():
            for digit in (1, 0, 2):
                longer = error + cost[digit], groups + count[digit]
                if longer[1] <= total and longer[0] < extended.get(longer[1], (torch.inf,))[0]:
                    extended[longer[1]] = (longer[0], [*digits, digit])
        best = extended
    return best[total][1]

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.granularity import Granularity

names = st.sampled_from(["tensor", "channel", "g1", "g7", "g32", "g64", "g1000"])
sides = st.integers(1, 130)


@settings(max_examples=80, deadline=None)
@given(names, st.integers(1, 6), sides)
def test_groups_join_to_the_matrix(name, rows, columns):
    granularity = Granularity.parse(name)
    matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    parts = granularity.to_groups(matrix)
    assert torch.equal(granularity.from_groups(parts, rows), matrix)
    assert sum(part.numel() for part in parts) == matrix.numel()


@settings(max_examples=80, deadline=None)
@given(names, st.integers(1, 6), sides)
def test_each_group_has_the_scale_in_its_place(name, rows, columns):
    """Every member of a group is replaced by the group's first member; the scales must say the same from either side."""
    granularity = Granularity.parse(name)
    matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    size = {"tensor": rows * columns, "channel": columns}.get(name) or int(name[1:])
    if name == "tensor":
        expected = torch.zeros(rows, columns)
    else:
        column = torch.arange(columns) // size * size
        expected = matrix[:, column]
    parts = granularity.to_groups(matrix)
    firsts = granularity.from_groups([part[:, :1] for part in parts], rows)
    assert firsts.shape == granularity.scale_shape(rows, columns)
    back = granularity.scales_to_groups(firsts, columns)
    spread = [first.expand_as(part) for first, part in zip(back, parts, strict=True)]
    assert torch.equal(granularity.from_groups(spread, rows), expected)


@pytest.mark.parametrize(("name", "columns", "sizes"), [
    ("g64", 128, {64: 2}), ("g64", 96, {64: 1, 32: 1}), ("g64", 100, {64: 1, 36: 1}), ("g64", 160, {64: 2, 32: 1}), ("g64", 65, {64: 1, 1: 1}),
    ("g64", 40, {40: 1}), ("channel", 100, {100: 1}),
])  # fmt: skip
def test_the_last_group_is_shorter_exactly(name, columns, sizes):
    parts = Granularity.parse(name).to_groups(torch.zeros(3, columns))
    assert {part.shape[1]: part.shape[0] // 3 for part in parts} == sizes


@pytest.mark.parametrize(("digits", "columns", "sizes"), [
    ("0", 40, [40]), ("1", 40, [32, 8]), ("2", 40, [16, 16, 8]), ("012", 192, [64, 32, 32, 16, 16, 16, 16]),
    ("021", 136, [64, 16, 16, 16, 16, 8]), ("0000", 200, [64, 64, 64, 8]),
])  # fmt: skip
def test_adaptive_groups_are_those_of_their_digits(digits, columns, sizes):
    granularity = Granularity.parse(f"adaptive32/{digits}")
    matrix = torch.arange(2.0 * columns).view(2, columns)
    parts = granularity.to_groups(matrix)
    assert granularity.scale_shape(2, columns) == (2, len(sizes))
    assert torch.equal(granularity.from_groups(parts, 2), matrix)
    firsts = granularity.from_groups([part[:, :1] for part in parts], 2)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    assert firsts[0].tolist() == starts
    back = granularity.scales_to_groups(firsts, columns)
    spread = [first.expand_as(part) for first, part in zip(back, parts, strict=True)]
    expected = torch.tensor(firsts[0].tolist()).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(granularity.from_groups(spread, 2)[0], expected)


def test_adaptive_groups_of_another_matrix_are_refused():
    with pytest.raises(BitassayError, match="3 blocks"):
        Granularity.parse("adaptive32/012").to_groups(torch.zeros(2, 128))


@pytest.mark.parametrize(
    "text",
    [
        "adaptive",
        "adaptive63",
        "adaptive64/",
        "adaptive64/3",
        "adaptive064",
        "",
        "g",
        "g0",
        "g064",
        "g-1",
        "g6.4",
        "g64 ",
        "64",
        "row",
        "Tensor",
        "g12345678",
    ],
)
def test_what_is_no_granularity_is_refused(text):
    with pytest.raises(BitassayError, match="granularity"):
        Granularity.parse(text)

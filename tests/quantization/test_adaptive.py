"""Adaptive groups: the best of every choice that there is, at as many groups, and counted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.quantization.codes.adaptive import adapted, cheapest, column_errors
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.storage import (
    description,
    expected_tensors,
    planned_bits,
    read_tensor,
    stored_tensors,
)
from bitassay.quantization.codes.tensor import from_codes
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme

COSTS = st.tuples(*[st.floats(0, 10)] * 3)


def uneven(rows: int = 16, columns: int = 200) -> torch.Tensor:
    """Columns 64 to 95 have outliers of their own."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[:, 64:96] *= 1 + 20 * (torch.rand(rows, 32, generator=torch.Generator().manual_seed(1)) > 0.9)
    return w


@settings(max_examples=60, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=5), st.integers(1, 40))
def test_the_choice_is_the_best_of_all(costs, last):
    """The last block may be shorter: its columns are `last`, of 64."""
    sizes = [64] * (len(costs) - 1) + [last]
    counts = [[-(-size // group) for group in (64, 32, 16)] for size in sizes]
    total = sum(count[1] for count in counts)
    chosen = cheapest([list(cost) for cost in costs], counts, total)
    assert sum(count[digit] for count, digit in zip(counts, chosen, strict=True)) == total
    best = min(
        sum(cost[digit] for cost, digit in zip(costs, digits, strict=True))
        for digits in itertools.product(range(3), repeat=len(costs))
        if sum(count[digit] for count, digit in zip(counts, digits, strict=True)) == total
    )
    assert sum(cost[digit] for cost, digit in zip(costs, chosen, strict=True)) == pytest.approx(
        best, abs=1e-9
    )


@pytest.mark.parametrize("scheme", [
    {"format": "int3"}, {"format": "int4", "symmetric": False, "scale": "mse"}, {"format": "ternary"}, {"format": "binary", "symmetric": False},
])  # fmt: skip
def test_small_groups_go_where_they_are_needed(scheme):
    w, fixed = uneven(), WeightScheme(granularity="g32", **scheme)
    adaptive, plain = quantize_tensor(w, fixed.with_granularity("adaptive32")), quantize_tensor(w, fixed)
    assert adaptive.scheme.granularity.startswith("adaptive32/")
    assert adaptive.scale.shape == plain.scale.shape
    error, plain_error = ((done.dequantize() - w).square().sum() for done in (adaptive, plain))
    assert error < 0.97 * plain_error
    assert error.item() == pytest.approx(column_errors(w, adaptive.scheme, None).sum().item(), rel=1e-4)


def test_importance_moves_the_small_groups():
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(format="int3", granularity="adaptive32")
    importance = torch.ones(256)
    importance[128:192] = 100
    digits = adapted(w, scheme, importance).granularity.removeprefix("adaptive32/")
    assert (digits[2], sorted(digits)) == ("2", ["0", "0", "1", "2"])
    assert adapted(w, scheme).granularity != f"adaptive32/{digits}"


def test_the_digits_are_counted_and_come_back():
    scheme = WeightScheme(format="int3", granularity="adaptive32", symmetric=False)
    w = uneven()
    done, plain = quantize_tensor(w, scheme), quantize_tensor(w, scheme.with_granularity("g32"))
    assert done.stored_bits == plain.stored_bits + 8  # four digits take a byte
    stored = description(done)
    assert planned_bits(stored, done.shape) == done.stored_bits
    assert planned_bits(stored.model_copy(update={"scheme": scheme}), done.shape) == done.stored_bits
    parts = stored_tensors(done)
    assert expected_tensors(stored, done.shape) == {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()}
    again = read_tensor(parts, type(stored).model_validate(stored.model_dump()), done.shape)
    assert torch.equal(again.dequantize(), done.dequantize())
    packed = from_codes(done.codes(), done.scale.float(), done.scheme, done.zero_points())
    assert torch.equal(packed.dequantize(), done.dequantize())


def test_settled_groups_stay():
    scheme = WeightScheme(format="int3", granularity="adaptive32/0211111")
    assert adapted(uneven(), scheme) is scheme
    assert Granularity.parse(scheme.granularity).is_settled
    fixed = WeightScheme(format="int3", granularity="g32")
    assert adapted(uneven(), fixed) is fixed

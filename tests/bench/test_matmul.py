"""Errors of products: against formulas, and against what the documents say."""

import json

import pytest
import torch

from bitassay.bench import matmul as module
from bitassay.bench.matmul import DOCUMENTED, matmul, relative_error, rounding_error, rounding_of
from bitassay.errors import BitassayError


@pytest.fixture(scope="module")
def run():
    return matmul(((16, 512), (100, 1024)), draws=3, repeats=0)


def rows(run, **wanted):
    return [row for row in run["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_errors_of_matrices():
    exact = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    rounded = exact + torch.tensor([[0.1, 0.0], [0.0, -0.3]])
    assert rounding_error(rounded, exact) == pytest.approx(0.04)
    assert relative_error(rounded, exact) == pytest.approx((0.1 / 30) ** 0.5)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_documented_errors_are_those_of_one_rounded_matrix(run, format):
    found = rows(run, format=format, scales="tensor")
    assert [row["documented"] for row in found] == [
        DOCUMENTED[format, 16, 512],
        DOCUMENTED[format, 100, 1024],
    ]
    for row in found:
        assert row["over_documented"] == pytest.approx(1, abs=0.1)
        low, high = row["rounding_error_range"]
        assert low <= row["rounding_error"] <= high


def test_two_rounded_sides_cost_more_than_one(run):
    for row in run["rows"]:
        if row["format"] != "bfloat16":
            assert row["product_error"] == pytest.approx(2**0.5 * row["weights_error"], rel=0.15)


def test_finer_scales_help_integers_and_hardly_floats(run):
    for shape in ("16x512", "100x1024"):
        (row,), (tensor,) = (rows(run, shape=shape, format="int8", scales=s) for s in ("row", "tensor"))
        assert row["product_error"] < 0.9 * tensor["product_error"]
        (row,), (tensor,) = (rows(run, shape=shape, format="fp8", scales=s) for s in ("row", "tensor"))
        assert row["product_error"] == pytest.approx(tensor["product_error"], rel=0.05)


def test_a_scale_for_all_inputs_is_that_of_the_largest():
    x = torch.tensor([[1.0, -127.0], [2.0, 3.0]])
    assert rounding_of(x, "int8", "tensor").scale == pytest.approx(1)
    assert rounding_of(x, "int8", "row").scale is None


def test_equal_seeds_give_equal_errors():
    first, second = (matmul(((4, 32),), draws=2, repeats=0, seed=3)["rows"] for _ in range(2))
    assert first == second
    assert matmul(((4, 32),), draws=2, repeats=0, seed=4)["rows"] != first


def test_speeds_are_ratios_to_both_dense_products():
    run = matmul(((2, 32),), draws=1, repeats=2)
    assert json.loads(json.dumps(run, allow_nan=False))["rows"]
    for row in run["rows"]:
        assert row["speed_over_float32"] > 0
        assert ("speed_over_bfloat16" in row) == (row["format"] != "bfloat16")
    assert {row["path"] for row in rows(run, format="int8")} == {"int8 product"}
    assert {row["path"] for row in rows(run, format="fp8")} == {"both dequantized, bf16 product"}


def test_large_products_are_compared_on_some_rows(monkeypatch):
    monkeypatch.setattr(module, "PRODUCT_ROWS", 3)
    few = matmul(((8, 64),), draws=1, repeats=0)["rows"]
    monkeypatch.setattr(module, "PRODUCT_ROWS", 8)
    every = matmul(((8, 64),), draws=1, repeats=0)["rows"]
    assert [row["rounding_error"] for row in few] == [row["rounding_error"] for row in every]
    assert [row["product_error"] for row in few] != [row["product_error"] for row in every]


@pytest.mark.parametrize(
    "options", [{"shapes": ((0, 4),)}, {"shapes": ((4, 2**16),)}, {"draws": 0}, {"repeats": -1}]
)
def test_nonsense(options):
    with pytest.raises(BitassayError):
        matmul(**options)

"""Binary planes: every step of the refinement at its optimum, so that the error only falls; every bit counted."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils._pytree import tree_map

from bitassay.errors import BitassayError
from bitassay.quantization.codes.binary import (
    binarize,
    first_planes,
    levels,
    on_planes,
    planes_of,
    recoded,
    refined,
    rescaled_columns,
    rescaled_first,
    rescaled_second,
)
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.storage import (
    description,
    expected_tensors,
    planned,
    planned_bits,
    read_tensor,
    stored_tensors,
)
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.kernels import packed_product
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.solvers.gptq import gptq, gptq_binary, gptq_on_levels

SCHEMES = [
    WeightScheme(format="binary", granularity=granularity, symmetric=symmetric, residual=residual, column_scales=c)
    for granularity, symmetric, residual, c in [
        ("channel", True, 0.0, True), ("channel", False, 0.1, True), ("g32", True, 1.0, False), ("g32", False, 0.3, True),
        ("g36", True, 0.1, False), ("tensor", False, 0.5, True), ("g32", False, 1.0, True), ("adaptive32", False, 0.2, True),
    ]
]  # fmt: skip
every_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.granularity}-{s.symmetric}-{s.residual}"
)


def weights(seed: int = 0, rows: int = 24, columns: int = 100) -> torch.Tensor:
    """Columns and rows of unequal sizes, off centre."""
    generator = torch.Generator().manual_seed(seed)
    columns_, rows_ = (torch.randn(n, generator=generator).exp() for n in (columns, rows))
    return (torch.randn(rows, columns, generator=generator) + 0.3) * columns_ * rows_[:, None] * 0.05


def inputs(seed: int = 0, columns: int = 100) -> torch.Tensor:
    """Mean squares of inputs, a few of them large."""
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1)).mul(2).exp()


def error(values: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> float:
    return ((values - w).double().square() * h).sum().item()


def in_double(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.mark.sample(3)
@every_scheme
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_error_never_rises(scheme, seed):
    """In float64: in float32 it may, by what rounding a regression on all weights at once comes to."""
    w, h = weights(seed), inputs(seed)
    settled = binarize(w, scheme, h, sweeps=0).scheme
    planes = tree_map(in_double, first_planes(w, settled, h))
    w, h = w.double(), h.double()
    errors = [error((planes.unscaled() * planes.column_scale), w, h)]
    for _ in range(12):
        planes = refined(planes, w, h, scheme.column_scales)
        errors.append(error((planes.unscaled() * planes.column_scale), w, h))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] * 0.999


@every_scheme
def test_refinement_pays_off_once_stored(scheme):
    w, h = weights(), inputs()
    plain, done = (error(binarize(w, scheme, h, sweeps).dequantize(), w, h) for sweeps in (0, 15))
    assert done < plain
    unweighed = error(binarize(w, scheme).dequantize(), w, h)
    assert done < unweighed


@every_scheme
def test_every_step_is_at_its_optimum(scheme):
    """Scales and means leave an error without slope; codes are the nearest of all levels."""
    w, h = weights(), inputs()
    settled = binarize(w, scheme, h, sweeps=0).scheme
    planes = refined(first_planes(w, settled, h), w, h, scheme.column_scales)
    target, weighed = w / planes.column_scale, (h * planes.column_scale.square()).expand(w.shape)
    size = (weighed * target.abs()).sum().item()

    planes = rescaled_first(planes, target, weighed)
    left = weighed * (target - planes.unscaled())
    assert planes.first.summed(left * planes.first.codes).abs().max().item() < 1e-5 * size
    if not scheme.symmetric:
        assert planes.first.summed(left).abs().max().item() < 1e-5 * size
    if planes.second is not None:
        planes = rescaled_second(planes, target, weighed)
        left = (weighed * (target - planes.unscaled()))[:, planes.salient]
        assert planes.second.summed(left * planes.second.codes).abs().max().item() < 1e-5 * size

    planes = recoded(planes, target)
    one = planes.first.widened(planes.first.scale)
    middle = 0 if planes.first.mean is None else planes.first.widened(planes.first.mean)
    two = torch.zeros_like(one)
    if planes.second is not None:
        two[:, planes.salient] = planes.second.widened(planes.second.scale)
    choices = torch.stack([middle + a * one + b * two for a in (-1, 1) for b in (-1, 1)])
    least = (choices - target).abs().amin(0)
    assert torch.allclose((planes.unscaled() - target).abs(), least, atol=1e-6)

    before, p = planes.column_scale, planes.unscaled()
    planes = rescaled_columns(planes, w)
    slope, positive = ((w - (planes.unscaled() * planes.column_scale)) * p).sum(0), (w * p).sum(0) > 0
    assert slope[positive].abs().max() < 1e-5 * (w * p).abs().sum(0).max()
    assert torch.equal(planes.column_scale[~positive], before[~positive])


@pytest.mark.parametrize("residual", [0.1, 0.5])
def test_the_second_plane_goes_where_the_weighed_error_is(residual):
    w, h = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), torch.ones(40)
    h[[3, 17, 20, 39]] = 100
    done = binarize(w, WeightScheme(format="binary", residual=residual), h)
    places = done.residual_indices().tolist()
    assert len(places) == 40 * residual
    assert set(places) >= {3, 17, 20, 39}
    assert done.residual.shape == (24, 40 * residual)
    alone = binarize(w, WeightScheme(format="binary"), h)
    important = [3, 17, 20, 39]
    gain = (done.dequantize() - w)[:, important].square().sum() / (alone.dequantize() - w)[
        :, important
    ].square().sum()
    assert gain < 0.5


@pytest.mark.parametrize(("scheme", "bits"), [
    ({"residual": 0.1}, 24 * (100 + 16) + 104 + 24 * (10 + 16)),  # a row's scale; a bitmap in whole bytes
    ({"residual": 1, "granularity": "g32"}, 2 * 24 * (100 + 4 * 16)),
    ({"column_scales": True, "symmetric": False}, 24 * (100 + 32) + 100 * 16),
    ({"residual": 0.26, "granularity": "g20", "column_scales": True}, 24 * (100 + 80) + 104 + 24 * (26 + 32) + 1600),
])  # fmt: skip
def test_every_bit_is_counted_and_planned(scheme, bits):
    scheme = WeightScheme(format="binary", **scheme)
    done = quantize_tensor(weights(), scheme)
    assert done.stored_bits == bits == planned_bits(planned(scheme), done.shape)


@every_scheme
def test_stored_and_read_back(scheme):
    done = quantize_tensor(weights(), scheme, importance=inputs())
    parts, stored = stored_tensors(done), description(done)
    assert expected_tensors(stored, done.shape) == {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()}
    again = read_tensor(parts, type(stored).model_validate(stored.model_dump()), done.shape)
    assert torch.equal(again.dequantize(), done.dequantize())
    assert done.to("meta").stored_bits == done.stored_bits
    if "residual_columns" in parts:
        with pytest.raises(BitassayError, match="as many columns"):
            read_tensor(parts | {"residual_columns": parts["residual_columns"] * 0}, stored, done.shape)


@pytest.mark.sample(3)
@every_scheme
def test_levels_are_what_weights_can_become(scheme):
    done, other = quantize_tensor(weights(), scheme), weights(5)
    back = done.dequantize()
    choices = levels(done)
    assert choices.shape == (4 if scheme.residual else 2, 24, 100)
    assert torch.allclose((choices - back).abs().amin(0), torch.zeros_like(back), atol=1e-6)
    again = on_planes(done, back)
    assert torch.allclose(again.dequantize(), back, atol=1e-6)
    moved = on_planes(done, other)
    assert torch.equal(moved.scale, done.scale)
    assert torch.allclose((moved.dequantize() - other).abs(), (choices - other).abs().amin(0), atol=1e-5)
    assert torch.equal(planes_of(moved).salient, planes_of(done).salient)


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_gptq_on_levels_is_gptq_where_the_levels_are_a_grid(order):
    w, x = weights(3), torch.randn(500, 100, generator=torch.Generator().manual_seed(1))
    hessian, spec = (x.T @ x).double(), Gptq(order=order)
    scheme = WeightScheme(format="int2", granularity="tensor", scale="absmax")
    grid = quantize_tensor(w, scheme).scale.float().item()
    steps = torch.tensor([-2.0, -1.0, 0.0, 1.0]) * grid
    found, damping = gptq_on_levels(w, hessian, steps[:, None, None].expand(4, 24, 100), spec)
    expected = gptq(w, hessian, [scheme], spec)
    assert damping == expected.damping
    assert torch.allclose(found, expected.updated, atol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=lambda s: f"{s.granularity}-{s.symmetric}-{s.residual}")
def test_gptq_lowers_the_error_of_the_output(scheme):
    w = weights(3)
    x = torch.randn(500, 100, generator=torch.Generator().manual_seed(1)) * inputs().sqrt()
    x = x + x.roll(1, 1) + 0.5 * x.roll(3, 1)  # correlated: there is something to make up with
    hessian = (x.T @ x).double()
    done, updated, damping = gptq_binary(w, hessian, scheme, Gptq())
    plain = quantize_tensor(w, scheme, importance=hessian.diagonal().float())
    error, plain_error = ((x @ (tensor.dequantize() - w).T).square().sum() for tensor in (done, plain))
    assert error < 0.95 * plain_error
    assert torch.equal(on_planes(done, updated).dequantize(), done.dequantize())
    assert damping == 0.01


@pytest.mark.sample(3)
@every_scheme
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_edge_values_stay_finite(scheme, dtype):
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    largest = torch.finfo(getattr(torch, dtype)).max / 2
    signs = torch.where(weights(0, 4, 70) < 0, -1.0, 1.0)
    dead = weights(0, 4, 70)
    dead[:, 7] = dead[2] = 0
    for w in (
        torch.zeros(3, 70),
        torch.full((2, 70), -3.0),
        dead,
        weights(0, 70, 1),
        weights(0, 4, 70) * 1e-38,
        torch.full((2, 70), 1e-45),
        torch.full((2, 70), largest),
        signs * largest,
    ):
        for h in (None, torch.zeros(w.shape[1]), torch.arange(w.shape[1]) % 2 * 1e30):
            done = quantize_tensor(w, scheme, importance=h)
            assert done.dequantize().isfinite().all()
            if not w.any():
                assert not done.dequantize().any()


def test_the_real_linear_computes_with_both_planes():
    scheme = WeightScheme(format="binary", granularity="g32", residual=0.2, column_scales=True)
    done = quantize_tensor(weights(0, 48, 128), scheme)
    assert packed_product(done) is None
    assert packed_product(replace(done, residual=None, residual_columns=None)) is None
    assert packed_product(replace(done, residual=None, residual_columns=None, column_scale=None)) is not None
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    linear = QuantizedLinear(done, None, torch.float32)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, done.dequantize()))


def test_planes_cannot_be_moved_along_a_grid():
    planes = {"format": "binary", "residual": 0.1}
    assert Recipe.model_validate({"name": "x", "weights": planes, "gptq": {}}).is_calibrated
    with pytest.raises(ValidationError, match="along a grid"):
        Recipe.model_validate({"name": "x", "weights": planes, "tune": {}})


@pytest.mark.slow
def test_a_calibrated_recipe_of_planes(stories):
    recipe = {
        "name": "planes",
        "weights": {"format": "binary", "residual": 0.2, "column_scales": True},
        "gptq": {},
        "calibration": {"samples": 4, "tokens": 64},
    }
    made = quantize(stories, Recipe.model_validate(recipe)).quantization
    assert all(tensor.residual is not None for tensor in made.tensors.values())


@pytest.mark.parametrize("scheme", [
    {"format": "int2", "residual": 0.1}, {"format": "ternary", "column_scales": True}, {"format": "binary", "residual": 1.1},
    {"format": "binary", "residual": 0.1, "rounding": "stochastic"}, {"format": "binary", "column_scales": True, "noise": 0.1},
])  # fmt: skip
def test_schemes_that_make_no_sense_are_refused(scheme):
    with pytest.raises(ValidationError):
        WeightScheme(**scheme)

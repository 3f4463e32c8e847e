"""Low-rank corrections against whitening by the book, perturbations, and plain singular value decomposition."""

from itertools import pairwise

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.solvers import LowRankSpec
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.low_rank import corrected, correction
from bitassay.quantization.solvers.solver import Solution

SHAPES = [(24, 40), (40, 24), (32, 32)]
INT2 = WeightScheme(format="int2", granularity="g16")


def problem(rows: int, columns: int, seed: int = 0, samples: int = 200):
    """A residual, and the Hessian of inputs whose scales and directions differ widely."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-2, 0.5, columns)
    x = torch.randn(samples, columns, generator=generator) @ mixing
    x = x.double()
    return residual, x.T @ x


def error(left, hessian) -> float:
    left = left.double()
    return ((left @ hessian) * left).sum().item()


def by_the_book(residual, hessian, rank):
    """Whitening with the symmetric root and its inverse, as the papers write it."""
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.sqrt() @ vectors.T
    u, s, vt = torch.linalg.svd(residual.double() @ root)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_it_is_what_whitening_gives(shape, rank):
    residual, hessian = problem(*shape)
    factors = correction(residual, hessian, rank, torch.float64, damping=0)
    product = factors.a @ factors.b
    assert factors.a.shape == (shape[0], rank)
    assert factors.b.shape == (rank, shape[1])
    assert torch.allclose(product, by_the_book(residual, hessian, rank), atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_small_step_improves_it(shape):
    residual, hessian = problem(*shape)
    factors = correction(residual, hessian, 4, torch.float64, damping=0)
    least = error(residual - factors.a @ factors.b, hessian)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        a = factors.a + 1e-3 * torch.randn(factors.a.shape, generator=generator)
        b = factors.b + 1e-3 * torch.randn(factors.b.shape, generator=generator)
        assert error(residual - a @ b, hessian) > least


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_falls_with_the_rank_and_is_below_plain_svd(shape, dtype):
    residual, hessian = problem(*shape)
    errors = [
        error(residual - correction(residual, hessian, rank, dtype).product(), hessian)
        for rank in (0, 1, 2, 4, 8, 16)
    ]
    assert errors[0] == pytest.approx(error(residual, hessian))
    assert all(after < before for before, after in pairwise(errors))
    u, s, vt = torch.linalg.svd(residual)
    assert errors[3] < 0.8 * error(residual - (u[:, :4] * s[:4]) @ vt[:4], hessian)


def test_b_makes_up_for_the_rounding_of_a():
    residual, hessian = problem(24, 40)
    factors = correction(residual, hessian, 8, torch.bfloat16)
    best = torch.linalg.lstsq(factors.a.double(), residual.double()).solution
    assert (factors.b == best.bfloat16()).float().mean() > 0.99
    assert factors.a.dtype == factors.b.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_hessian_means_plain_svd(shape):
    residual, hessian = problem(*shape)
    factors = correction(residual, torch.zeros_like(hessian), 4, torch.float64)
    u, s, vt = torch.linalg.svd(residual.double())
    assert torch.allclose(factors.a @ factors.b, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0, 0.01])
def test_a_singular_hessian(shape, damping):
    """Inputs in three directions only: rank three leaves nothing in them."""
    residual, hessian = problem(*shape, samples=3)
    factors = correction(residual, hessian, 3, torch.float64, damping)
    left = error(residual - factors.a @ factors.b, hessian)
    assert abs(left) < (1e-2 if damping else 1e-9) * error(residual, hessian)
    for rank in (5, min(shape)):
        product = correction(residual, hessian, rank, torch.float16, damping).product()
        assert product.isfinite().all()
    dead = hessian.clone()
    dead[:, 0] = dead[0] = 0
    assert correction(residual, dead, 4).product().isfinite().all()


def test_a_zero_residual_stays_zero():
    _, hessian = problem(24, 40)
    assert not correction(torch.zeros(24, 40), hessian, 4).product().any()


def test_what_cannot_be_is_refused():
    residual, hessian = problem(24, 40)
    with pytest.raises(BitassayError, match="rank 25") as caught:
        correction(residual, hessian, 25)
    assert "24" in caught.value.remedy
    hessian[0, 0] = torch.nan
    with pytest.raises(BitassayError, match="NaN"):
        correction(residual, hessian, 2)


def by_nearest(w, scheme=INT2):
    return Solution(quantize_tensor(w, scheme), w)


def test_beside_the_codes():
    weight, hessian = problem(32, 48)
    plain = quantize_tensor(weight, INT2)
    made = corrected(weight, hessian, LowRankSpec(rank=4), by_nearest).tensor
    assert torch.equal(made.packed, plain.packed)
    assert made.stored_bits == plain.stored_bits + 16 * 4 * (32 + 48)
    before, after = (error(weight - t.dequantize(), hessian) for t in (plain, made))
    assert after < 0.8 * before
    none = corrected(weight, hessian, LowRankSpec(rank=0), by_nearest).tensor
    assert none.low_rank is None
    assert torch.equal(none.dequantize(), plain.dequantize())


def test_a_round_that_is_worse_does_not_count():
    weight, hessian = problem(32, 48)
    coarse = WeightScheme(format="binary", granularity="channel", scale="mse")
    schemes = [INT2, coarse, coarse]
    spec = LowRankSpec(rank=4, rounds=3)
    made = corrected(weight, hessian, spec, lambda w: by_nearest(w, schemes.pop(0))).tensor
    once = corrected(weight, hessian, LowRankSpec(rank=4), by_nearest).tensor
    assert not schemes
    assert torch.equal(made.dequantize(), once.dequantize())


def test_alternating_helps_and_the_best_round_counts():
    weight, hessian = problem(32, 48)
    calls = []

    def rounding(w):
        calls.append(w)
        return by_nearest(w)

    errors = []
    for rounds in (1, 2, 6):
        made = corrected(weight, hessian, LowRankSpec(rank=6, rounds=rounds), rounding).tensor
        errors.append(
            error(weight - made.dequantize(), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48))
        )
    assert len(calls) == 9
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < 0.95 * errors[0]
    assert torch.equal(calls[1], weight)
    assert not torch.equal(calls[2], weight)

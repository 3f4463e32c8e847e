"""Refined rotations: orthogonal, and never worse than where they began."""

import pytest
import torch

from bitassay.quantization.codes.hadamard import hadamard, random_orthogonal
from bitassay.quantization.transforms import procrustes
from bitassay.quantization.transforms.procrustes import four_bits, nearest_orthogonal, refine


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def error(x, q) -> float:
    turned = q.apply(x)
    return (turned - four_bits(turned)).square().sum().item()


@pytest.mark.parametrize("make", [hadamard, random_orthogonal])
def test_the_error_falls_with_rounds_and_q_stays_orthogonal(make):
    x = torch.randn(300, 24, generator=generator()) * torch.linspace(0.1, 3, 24)
    start = make(24, generator())
    errors = [error(x, refine(x, start, rounds)) for rounds in (0, 5, 40)]
    assert errors[0] == pytest.approx(error(x, start), rel=1e-4)
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < 0.95 * errors[0]
    q = refine(x, start, 5).matrix()
    assert torch.allclose(q @ q.T, torch.eye(24).double(), atol=1e-12)


def test_a_quantizer_that_gets_worse_leaves_the_start():
    x, start = torch.randn(50, 12, generator=generator()), hadamard(12)
    calls = []

    def worse(turned):
        calls.append(1)
        return turned.roll(len(calls) - 1, 1)

    assert torch.allclose(refine(x, start, 4, worse).matrix(), start.matrix(), atol=1e-6)
    assert len(calls) == 5


def test_massive_rows_weigh_more(monkeypatch):
    """With few massive rows among many others, theirs is the error that has to go."""
    others = torch.randn(400, 24, generator=generator())
    massive = 0.3 * torch.randn(4, 24, generator=generator())
    massive[:, 5] = 20
    x, start = torch.cat((others, massive)), random_orthogonal(24, generator())
    weighted = error(massive, refine(x, start, 30))
    assert weighted < 0.7 * error(massive, start)
    monkeypatch.setattr(procrustes, "MASSIVE_WEIGHT", 1)
    assert weighted < 0.7 * error(massive, refine(x, start, 30))


def test_the_nearest_orthogonal_matrix_is_nearest():
    matrix = torch.randn(8, 8, generator=generator()).double()
    best = nearest_orthogonal(matrix)
    for seed in range(20):
        other = random_orthogonal(8, torch.Generator().manual_seed(seed)).matrix()
        small_step = torch.matrix_exp(0.1 * (other - other.T)) @ best
        assert (matrix - best).norm() < (matrix - small_step).norm()


def test_zero_rows_do_no_harm():
    q = refine(torch.zeros(5, 12), hadamard(12), 3).matrix()
    assert q.isfinite().all()

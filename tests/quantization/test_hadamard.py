"""Hadamard matrices against their definition, and fast products against dense ones."""

import math

import pytest
import scipy.linalg
import torch

from bitassay.quantization.codes.hadamard import (
    LARGEST_BLOCK,
    block_hadamard,
    hadamard,
    paley,
    paley_block,
    random_orthogonal,
)

# hidden sizes, MLP widths and head sizes of the models in reach
SIZES = [
    1,
    2,
    12,
    20,
    24,
    28,
    36,
    40,
    52,
    64,
    76,
    80,
    96,
    128,
    160,
    576,
    640,
    768,
    896,
    960,
    1024,
    1152,
    1408,
    1536,
]
LARGE = {4864: 76, 8960: 140, 9728: 76, 11008: 344, 13824: 108, 18944: 148, 14336: 28, 17408: 68, 25600: 100}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.sample(10)
@pytest.mark.parametrize("size", [*SIZES, 2048])
def test_rows_are_orthogonal_and_entries_are_signs(size):
    found = hadamard(size)
    entries = found.matrix() * math.sqrt(size)
    assert torch.allclose(entries.abs(), torch.ones_like(entries), atol=1e-12)
    signs = entries.round()
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.sample(10)
@pytest.mark.parametrize("order", [o for o in range(4, 800, 4) if paley_block(o) == o])
def test_every_paley_block(order):
    h = paley(order).double()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(("size", "block"), LARGE.items())
def test_large_sizes_have_small_blocks(size, block):
    assert paley_block(size) == block
    x = torch.randn(2, size, generator=generator(), dtype=torch.float64)
    turned = hadamard(size).apply(x)
    assert torch.allclose(turned @ turned.T, x @ x.T)
    spike = torch.eye(1, size, dtype=torch.float64)
    assert torch.allclose(hadamard(size).apply(spike).abs() * math.sqrt(size), torch.ones(1, size).double())


@pytest.mark.parametrize("size", [0, -4, 3, 6, 10, 92, 116, 172, 188, 577, 4 * 1031])
def test_sizes_without_one(size):
    assert paley_block(size) is None
    assert hadamard(size) is None


def test_a_block_is_never_larger_than_the_limit():
    q = 1051  # a prime, 3 mod 4: Paley's order 1052 is beyond the limit
    assert q + 1 > LARGEST_BLOCK
    assert paley_block(q + 1) is None


@pytest.mark.parametrize("size", [24, 36, 160, 576])
@pytest.mark.parametrize("make", [hadamard, random_orthogonal, block_hadamard])
def test_a_product_is_the_dense_one_and_the_transpose_undoes_it(make, size):
    q = make(size, generator())
    x = torch.randn(3, 2, size, generator=generator(), dtype=torch.float64)
    assert q.size == size
    assert torch.allclose(q.apply(x), x @ q.matrix(), atol=1e-12)
    assert torch.allclose(q.apply_transposed(x), x @ q.matrix().T, atol=1e-12)
    assert torch.allclose(q.matrix() @ q.matrix().T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_kronecker_order_is_the_one_of_torch():
    dense = torch.kron(paley(36), torch.tensor(scipy.linalg.hadamard(16))).double() / 24
    assert torch.allclose(hadamard(576).matrix(), dense, atol=1e-15)
    three = hadamard(12 * 128)
    assert len(three.factors) == 3
    assert torch.allclose(
        three.matrix() * math.sqrt(1536),
        torch.kron(paley(12), torch.tensor(scipy.linalg.hadamard(128))).double(),
    )


def test_a_block_diagonal_one_stays_in_its_blocks():
    q = block_hadamard(4 * 29, generator()).matrix()
    assert torch.allclose(q.abs(), torch.kron(torch.eye(29), torch.full((4, 4), 0.5)).double())


def test_16_bit_numbers_are_turned_in_fp32():
    x = torch.randn(5, 576, generator=generator()).bfloat16()
    q = hadamard(576, generator())
    assert torch.equal(q.apply(x), q.apply(x.float()).bfloat16())
    assert q.apply(x).dtype == torch.bfloat16


def test_seeds_decide():
    first, again = hadamard(96, generator()), hadamard(96, generator())
    other = hadamard(96, torch.Generator().manual_seed(4))
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)
    assert torch.equal(
        random_orthogonal(24, generator()).matrix(), random_orthogonal(24, generator()).matrix()
    )

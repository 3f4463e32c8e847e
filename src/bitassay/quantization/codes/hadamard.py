"""Orthogonal matrices that are cheap to apply: Hadamard matrices of every size that model shapes need.

A Hadamard matrix has entries 1 and -1 and orthogonal rows, `H H^T = n I`. Divided by sqrt(n) it spreads a
single outlier over all n coordinates, which is why rotations for quantization use it. Two constructions:

    Sylvester   H_2n = [[H_n, H_n], [H_n, -H_n]]: powers of two
    Paley       from Q = chi(a - b), chi being 1 on the squares of the field of q elements, -1 elsewhere and
                0 at 0:
                I   order q + 1, q = 3 mod 4      H = I + [[0, 1], [-1, Q]]
                II  order 2(q + 1), q = 1 mod 4   H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],
                                                  C = [[0, 1], [1, Q]]

A size n = m 2^k gets the Kronecker product of the smallest Paley block m that there is and a Sylvester
matrix: 576 = 36 x 16, 896 = 28 x 32, 4864 = 76 x 64. q is a prime, its square or its cube (11008, the MLP of
Llama-2-7B, is 344 x 32, from 343 = 7^3). A product costs the sum of the factors' sizes an element, not n.

There is none here for odd orders, and where the smallest Paley block would be larger than LARGEST_BLOCK or
does not exist, such as for 92, 116, 156, 172 and 188. Those are known from other constructions
(compressed-tensors has a table up to 256, with other matrices than Paley's).

Source: Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933); their use for language models: QuIP#
(2402.04396, section 3), QuaRot (2404.00456, section 2.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

LARGEST_BLOCK = 1024
SYLVESTER_FACTOR = 64  # one product with a matrix of this size beats six passes of additions

Square = Float[Tensor, "_ _"]


@dataclass(frozen=True)
class Orthogonal:
    """`Q = diag(signs) (F_1 x F_2 x ...)`, orthogonal, applied without being formed.

    factors: orthogonal, in fp64; their sizes multiply to Q's. signs: 1 and -1, or None for none. A product is
    computed in fp32 at least, and returned in the dtype of its argument.
    """

    factors: tuple[Square, ...]
    signs: Float[Tensor, " size"] | None = None

    @property
    def size(self) -> int:
        return math.prod(len(factor) for factor in self.factors)

    def apply(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Return `x Q`."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.signs is not None:
            work = work * self.signs.to(work)
        return kronecker_product(work, self.factors).to(x.dtype)

    def apply_transposed(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Return `x Q^T`, which undoes `apply`."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        work = kronecker_product(work, [factor.T for factor in self.factors])
        return (work if self.signs is None else work * self.signs.to(work)).to(x.dtype)

    def matrix(self) -> Float[Tensor, "size size"]:
        """Return Q itself, in fp64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Orthogonal":
        signs = None if self.signs is None else self.signs.to(device, dtype)
        return Orthogonal(tuple(factor.to(device, dtype) for factor in self.factors), signs)


def kronecker_product(
    x: Float[Tensor, "*rows size"], factors: Sequence[Square]
) -> Float[Tensor, "*rows size"]:
    """Return `x (F_1 x F_2 x ...)`: one small product along each axis of `x` seen as a grid."""
    grid = x.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # the first axis is used up, its result becomes the last: all end in order
        grid = grid.movedim(1, -1) @ factor.to(x)
    return grid.reshape(x.shape)


def hadamard(size: int, generator: torch.Generator | None = None) -> Orthogonal | None:
    """Return the Hadamard matrix over sqrt(size), with a generator random signs first; None: none here."""
    signs = None if generator is None else _signs(size, generator)
    block = paley_block(size)
    if block is None:
        return None
    factors = [] if block == 1 else [paley(block).double() / math.sqrt(block)]
    rest = size // block
    while rest > 1 or not factors:
        part = min(rest, SYLVESTER_FACTOR)
        factors.append(torch.from_numpy(scipy.linalg.hadamard(part)).double() / math.sqrt(part))
        rest //= part
    return Orthogonal(tuple(factors), signs)


def block_hadamard(size: int, generator: torch.Generator) -> Orthogonal:
    """Return random signs, then the largest Hadamard matrix whose order divides `size` along the diagonal."""
    block = next(h for n in range(size, 0, -1) if size % n == 0 and (h := hadamard(n)) is not None)
    factors = (torch.eye(size // block.size, dtype=torch.float64), *block.factors)
    return Orthogonal(factors, _signs(size, generator))


@lru_cache(maxsize=64)
def seeded_hadamard(size: int, seed: int) -> Orthogonal:
    """Return the random Hadamard rotation of that seed, in blocks where the size has no other."""
    full = hadamard(size, torch.Generator().manual_seed(seed))
    return block_hadamard(size, torch.Generator().manual_seed(seed)) if full is None else full


def random_orthogonal(size: int, generator: torch.Generator) -> Orthogonal:
    """Return a uniform sample of the orthogonal group: QR of a Gaussian, signs by R's (math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Orthogonal((q * r.diagonal().sign(),))


def _signs(size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1


def paley_block(size: int) -> int | None:
    """Return the smallest order m of a Paley matrix (or 1) such that `size` is m times a power of two."""
    block = size // (size & -size) if size > 0 else 0  # the odd part
    if block == 1:
        return 1
    while block and size % block == 0 and block <= LARGEST_BLOCK:
        if block % 4 == 0 and _paley_field(block) is not None:
            return block
        block *= 2
    return None


def paley(order: int) -> Int[Tensor, "order order"]:
    """Return the Hadamard matrix of a Paley order, of the first kind where there is one."""
    field = _paley_field(order)
    assert field is not None, f"{order} is no Paley order"
    bordered = torch.nn.functional.pad(_characters(*field), (1, 0, 1, 0))
    first = field[0] ** field[1] + 1 == order
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if first else 1
    eye = torch.eye(len(bordered), dtype=torch.int64)
    if first:
        return bordered + eye
    off, on = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(bordered, off) + torch.kron(eye, on)


def _paley_field(order: int) -> tuple[int, int] | None:
    """Return the prime p and the power k, at most 3, of the field of q = p^k elements."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and q > 1:
            prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
            if power := next((k for k in (1, 2, 3) if prime**k == q), None):
                return prime, power
    return None


def _characters(p: int, k: int) -> Int[Tensor, "q q"]:
    """Return chi(a - b) over p^k elements: polynomials whose coefficients are a number's digits to base p."""
    powers = p ** torch.arange(k)
    digits = torch.arange(p**k)[:, None] // powers % p
    squares = torch.zeros(len(digits), 2 * k - 1, dtype=torch.int64)
    for degree in range(k):
        squares[:, degree : degree + k] += digits[:, degree : degree + 1] * digits
    modulus = _irreducible(p, k)
    for degree in range(2 * k - 2, k - 1, -1):  # x^k = -(modulus without its leading term)
        squares[:, degree - k : degree] -= squares[:, degree : degree + 1] * modulus
    chi = torch.full((p**k,), -1)
    chi[squares[:, :k] % p @ powers] = 1
    chi[0] = 0
    return chi[(digits[:, None] - digits[None]) % p @ powers]


def _irreducible(p: int, k: int) -> Int[Tensor, " k"]:
    """Return the lower coefficients of a monic polynomial without a root mod p: irreducible up to k = 3."""
    x = torch.arange(p)
    for number in range(p**k):
        lower = number // p ** torch.arange(k) % p
        value = x**k + sum(int(c) * x**degree for degree, c in enumerate(lower))
        if k == 1 or (value % p != 0).all():
            return lower
    raise AssertionError("every degree has an irreducible polynomial")

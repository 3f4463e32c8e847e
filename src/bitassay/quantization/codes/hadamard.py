"""Orthogonal matrices that are cheap to apply: Hadamard matrices of every size that model shapes need.

A Hadamard matrix has entries 1 and -1 and orthogonal rows, `H H^T = n I`. Divided by sqrt(n) it spreads a
single outlier over all n coordinates, which is why rotations for quantization use it. Two constructions
cover the sizes at hand:

    Sylvester   H_2n = [[H_n, H_n], [H_n, -H_n]]: powers of two
    Paley       from Q = chi(a - b), chi being 1 on the squares of the field of q elements, -1 elsewhere and
                0 at 0:
                I   order q + 1, q = 3 mod 4      H = I + [[0, 1], [-1, Q]]
                II  order 2(q + 1), q = 1 mod 4   H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],
                                                  C = [[0, 1], [1, Q]]

A size n = m 2^k gets the Kronecker product of the smallest Paley block m that there is and a Sylvester
matrix: 576 = 36 x 16, 896 = 28 x 32, 1536 = 12 x 128, 4864 = 76 x 64. q is a prime, its square or its cube
(11008, the MLP of Llama-2-7B, is 344 x 32, from 343 = 7^3). A product with a Kronecker product of small
factors costs the sum of their sizes an element, not n.

There is no Hadamard matrix of an odd order or of twice an odd one (beyond 1 and 2), and none *here* where the
smallest Paley block would be larger than LARGEST_BLOCK or does not exist, such as for 92, 116, 156, 172 and
188. Those are known from other constructions, which are left out.

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
        """`x Q`."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.signs is not None:
            work = work * self.signs.to(work)
        return kronecker_product(work, self.factors).to(x.dtype)

    def apply_transposed(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """`x Q^T`, which undoes `apply`."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        work = kronecker_product(work, [factor.T for factor in self.factors])
        return (work if self.signs is None else work * self.signs.to(work)).to(x.dtype)

    def matrix(self) -> Float[Tensor, "size size"]:
        """Q itself, in fp64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Orthogonal":
        signs = None if self.signs is None else self.signs.to(device, dtype)
        return Orthogonal(tuple(factor.to(device, dtype) for factor in self.factors), signs)


def hadamard(size: int) -> Orthogonal | None:
    """The Hadamard matrix of this order over sqrt(size); None where there is none here."""
    block = paley_block(size)
    if block is None:
        return None
    factors = [] if block == 1 else [paley(block).double() / math.sqrt(block)]
    rest = size // block
    while rest > 1 or not factors:
        part = min(rest, SYLVESTER_FACTOR)
        factors.append(torch.from_numpy(scipy.linalg.hadamard(part)).double() / math.sqrt(part))
        rest //= part
    return Orthogonal(tuple(factors))


def random_hadamard(size: int, generator: torch.Generator) -> Orthogonal | None:
    """`diag(signs) H`: the same with random signs on the coordinates that go in."""
    fixed = hadamard(size)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return None if fixed is None else Orthogonal(fixed.factors, signs)


def block_hadamard(size: int, generator: torch.Generator) -> Orthogonal:
    """Random signs, then the largest Hadamard matrix whose order divides `size`, along the diagonal."""
    order = next(n for n in range(size, 0, -1) if size % n == 0 and paley_block(n) is not None)
    block = hadamard(order)
    assert block is not None
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return Orthogonal((torch.eye(size // order, dtype=torch.float64), *block.factors), signs)


@lru_cache(maxsize=64)
def seeded_hadamard(size: int, seed: int) -> Orthogonal:
    """The random Hadamard rotation of that seed; in blocks along the diagonal where the size has no other."""
    found = random_hadamard(size, torch.Generator().manual_seed(seed))
    return block_hadamard(size, torch.Generator().manual_seed(seed)) if found is None else found


def random_orthogonal(size: int, generator: torch.Generator) -> Orthogonal:
    """Uniform over the orthogonal group: QR of a Gaussian matrix, signs fixed by R's (math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Orthogonal((q * r.diagonal().sign(),))


def kronecker_product(
    x: Float[Tensor, "*rows size"], factors: Sequence[Square]
) -> Float[Tensor, "*rows size"]:
    """`x (F_1 x F_2 x ...)`: one small product along each axis of `x` seen as a grid."""
    grid = x.reshape(-1, *(len(factor) for factor in factors))
    for (
        factor
    ) in factors:  # the first axis is used up, its result becomes the last: in the end all are in order
        grid = grid.movedim(1, -1) @ factor.to(x)
    return grid.reshape(x.shape)


def paley_block(size: int) -> int | None:
    """The smallest order m of a Paley matrix (or 1) such that `size` is m times a power of two."""
    block = size // (size & -size) if size > 0 else 0  # the odd part
    if block == 1:
        return 1
    while block and size % block == 0 and block <= LARGEST_BLOCK:
        if block % 4 == 0 and _paley_field(block) is not None:
            return block
        block *= 2
    return None


def paley(order: int) -> Int[Tensor, "order order"]:
    """The Hadamard matrix of a Paley order, of the first kind where there is one."""
    q = _paley_field(order)
    assert q is not None, f"{order} is no Paley order"
    bordered = torch.nn.functional.pad(_characters(q), (1, 0, 1, 0))
    bordered[0, 1:] = 1
    if order == q + 1:
        bordered[1:, 0] = -1
        return bordered + torch.eye(order, dtype=torch.int64)
    bordered[1:, 0] = 1
    off, on = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(bordered, off) + torch.kron(torch.eye(q + 1, dtype=torch.int64), on)


def _paley_field(order: int) -> int | None:
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and _prime_power(q) is not None:
            return q
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, k)` with q = p^k, k at most 3."""
    if q < 2:
        return None
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    return next(((prime, k) for k in (1, 2, 3) if prime**k == q), None)


def _characters(q: int) -> Int[Tensor, "q q"]:
    """chi(a - b) over the field of q elements: polynomials, whose coefficients are a number's digits to base
    p."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    places = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // places % p
    chi = torch.full((q,), -1)
    chi[_squares(digits, p) @ places] = 1
    chi[0] = 0
    return chi[(digits[:, None] - digits[None]) % p @ places]


def _squares(digits: Int[Tensor, "q k"], p: int) -> Int[Tensor, "q k"]:
    k = digits.shape[1]
    product = torch.zeros(len(digits), 2 * k - 1, dtype=torch.int64)
    for place in range(k):
        product[:, place : place + k] += digits[:, place : place + 1] * digits
    modulus = _irreducible(p, k)
    for place in range(2 * k - 2, k - 1, -1):  # x^k = -(modulus without its leading term)
        product[:, place - k : place] -= product[:, place : place + 1] * modulus
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> Int[Tensor, " k"]:
    """Lower coefficients of a monic polynomial of degree k without a root mod p; up to k = 3 that makes it
    irreducible."""
    x = torch.arange(p)
    for number in range(p**k):
        lower = number // p ** torch.arange(k) % p
        value = x**k + sum(int(c) * x**place for place, c in enumerate(lower))
        if k == 1 or (value % p != 0).all():
            return lower
    raise AssertionError("every degree has an irreducible polynomial")

"""A rotation made for given rows: alternate between rounding and Procrustes.

Wanted is an orthogonal Q under which rows x lose little when they are rounded, `||x Q - round(x Q)||`. With
what was rounded held fixed the best Q is known, `Q = U V^T` of the singular value decomposition of
`x^T round(x Q)`; then the rows are rounded anew, and so on. Rounding with a scale of its own for each row is
not a projection, so the error need not fall at every step: the best Q that was seen counts.

Source: DFRot (2412.00648, section 4), with its greater weight on the few tokens whose activations are
massive.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.models.precision import exact
from bitassay.quantization.codes.hadamard import Orthogonal

MASSIVE_WEIGHT = 100  # of the squared error of a row that one coordinate dominates

Rows = Float[Tensor, "rows size"]


def four_bits(x: Rows) -> Rows:
    """Round each row to nearest in 15 levels up to its largest magnitude."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 7
    return (x / scale).round() * scale


def refine(
    x: Rows, start: Orthogonal, rounds: int, quantize: Callable[[Rows], Rows] = four_bits
) -> Orthogonal:
    """Return the rotation with the least weighted error of `rounds` steps from `start` on."""
    x = x.float()
    energy = x.square()
    massive = energy.amax(1, keepdim=True) > energy.sum(1, keepdim=True) / 2
    x = torch.where(massive, x * MASSIVE_WEIGHT**0.5, x)
    q = best = start.matrix().to(x)
    least = torch.inf
    for step in range(rounds + 1):
        turned = x @ q
        rounded = quantize(turned)
        if (error := exact(turned - rounded).square().sum().item()) < least:
            best, least = q, error
        if step < rounds:
            q = nearest_orthogonal(x.T @ rounded).to(x)
    return Orthogonal((nearest_orthogonal(best),))


def nearest_orthogonal(matrix: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """Return `U V^T` of `U S V^T`, in fp64: the orthogonal matrix with the largest inner product."""
    u, _, vt = torch.linalg.svd(exact(matrix))
    return u @ vt

"""Quantize a matrix by its scheme alone, rounding to nearest: `quantize_tensor`.

Fake quantization is `quantize_tensor(w, scheme).dequantize()`. Solvers that know a matrix's inputs are in
`solvers/`.
"""

import torch

from bitassay.errors import BitassayError
from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.binary import binarize
from bitassay.quantization.codes.copies import digit_planes, merged, offset_copies, scaled
from bitassay.quantization.codes.grid import Grid, joined, widened
from bitassay.quantization.codes.hadamard import seeded_hadamard
from bitassay.quantization.codes.rounding import (
    generator_for,
    round_stochastically,
    round_to_nearest,
    round_with_feedback,
    with_noise,
)
from bitassay.quantization.codes.scales import matrix_grids
from bitassay.quantization.codes.tensor import QuantizedTensor, on_grid
from bitassay.quantization.recipe.formats import RUN
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix


def quantize_tensor(
    weight: Matrix, scheme: WeightScheme, name: str = "weight", importance: Columns | None = None
) -> QuantizedTensor:
    """Round a matrix to nearest on the grids that `scheme` asks for, each column's error weighed by its
    `importance`: the mean squared input, or a Hessian's diagonal. Raises BitassayError that names the tensor
    where a value is NaN or infinite, or too large for the scale's dtype, or an importance is not finite or
    negative. Anything else comes back finite: zeros as zeros (on a grid with an offset, as half the smallest
    step there is), constant groups to within the format's own error, and a group larger than the row is the
    row."""
    check_weight(weight, scheme, name)
    if importance is not None and not ((importance >= 0) & importance.isfinite()).all():
        raise BitassayError(
            f"{name}: importances must be finite and not negative", "check the calibration inputs"
        )
    w = weight.detach().float()
    if scheme.copies is not None:
        return _copies(w, scheme, name, importance)
    if scheme.has_planes:
        return binarize(w, scheme, importance)
    if scheme.turned is not None:
        w, importance = seeded_hadamard(w.shape[1], scheme.turned).apply(w), None  # of unrotated columns
    scheme = adapted(w, scheme, importance)
    grids = matrix_grids(w, scheme, importance)
    shared = joined(Granularity.parse(scheme.granularity), grids, len(w))
    return on_grid(_codes(w, grids, scheme, name), shared, scheme)


def check_weight(weight: Matrix, scheme: WeightScheme, name: str) -> None:
    """Raise BitassayError where rows do not fit the format, weights are not finite, or scales in the scheme's
    dtype cannot hold them."""
    if scheme.number_format.levels is not None and weight.shape[1] % RUN:
        raise BitassayError(
            f"{name}: {scheme.format} is of rows of whole runs of {RUN} weights, not of {weight.shape[1]}",
            "a format without such runs, such as int4 in groups of 32",
        )
    if not weight.isfinite().all():
        raise BitassayError(f"{name}: NaN or infinite weights cannot be quantized", "restore the checkpoint")
    # Half, since the range of a group and the distance from its mean are up to twice the largest weight.
    if weight.abs().max() > torch.finfo(getattr(torch, scheme.scale_dtype)).max / 2:
        raise BitassayError(
            f"{name}: weights up to {weight.abs().max():.3g} overflow scales in {scheme.scale_dtype}",
            "scale_dtype: float32",
        )


def _codes(w: Matrix, grids: list[Grid], scheme: WeightScheme, name: str) -> Matrix:
    granularity, generator = Granularity.parse(scheme.granularity), generator_for(scheme.seed, name)
    groups = granularity.to_groups(w)
    if scheme.noise:
        groups = [with_noise(w, grid, scheme.noise, generator) for w, grid in zip(groups, grids, strict=True)]
    if scheme.rounding == "feedback":
        grid = joined(granularity, grids, len(w)).each(lambda part: widened(granularity, part, w.shape))
        return round_with_feedback(granularity.from_groups(groups, len(w)), grid)
    if scheme.rounding == "stochastic":
        codes = [round_stochastically(w, grid, generator) for w, grid in zip(groups, grids, strict=True)]
    else:
        codes = [round_to_nearest(w, grid) for w, grid in zip(groups, grids, strict=True)]
    return granularity.from_groups(codes, len(w))


def _copies(weight: Matrix, scheme: WeightScheme, name: str, importance: Columns | None) -> QuantizedTensor:
    copies = scheme.copies
    assert copies is not None
    if copies.differ == "digits":
        parts = digit_planes(quantize_tensor(weight, copies.whole(scheme), name, importance), scheme)
    elif copies.differ == "offset":
        parts = offset_copies(weight, scheme, importance)
    else:
        parts = []
        for copy in copies.schemes(scheme):
            parts.append(quantize_tensor(weight, copy, name, importance))
            if copies.differ == "residual":
                weight = weight - parts[-1].dequantize()
    return merged([scaled(part, share) for part, share in zip(parts, copies.shares, strict=True)])

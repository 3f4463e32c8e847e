"""Smoothing: columns of a linear's input that are hard to round are made smaller, its weights larger.

A few columns of the activations are tens of times larger than the others, and one scale a token has to span
them all. `x W^T = (x / s)(W s)^T` moves the difficulty to the weights, which have a scale for each row; the
division is folded into the operation before, or done at run time (`folding.py`). Two ways to choose s:

    smoothquant  s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)      (2211.10438, eq. 4), for rounded inputs;
                 the maximum over all linears that read X
    awq          s_j = mean |X_j|^a: the a among `exponents` numbers from 0 up to, not with, 1 that makes
                 sum |X (Q(W s) / s - W)^T|^2 over those linears least (2306.00978, section 3.2), for rounded
                 weights; s is divided by sqrt(max s * min s). With `clip`, each group of weights is then
                 clamped to the share of its largest magnitude, 1 down to 0.5, that makes the error of the
                 group's part of the output least, queries and keys excepted

Differences from AWQ's own code: the error is that of the linears' outputs, not of the whole block's, and Q is
the recipe's scheme, whatever it is. Columns that are always zero, in X or in W, keep s = 1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.opened import present
from bitassay.models.precision import exact
from bitassay.quantization.codes.grid import widened
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.inputs.ranges import Ranges
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.transforms import Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Columns, Matrix
from bitassay.quantization.transforms.folding import Fold, find_folds, fold
from bitassay.quantization.transforms.residual_stream import Weight, unchanged
from bitassay.record.progress import Progress, silent

CLIP_SHARES = tuple(1 - 0.05 * step for step in range(11))
UNCLIPPED = ("q_proj", "k_proj")


class Smoothed(NamedTuple):
    """The scales by the name of what took them up, and why other linears have none."""

    scales: dict[str, Float[Tensor, " columns"]]
    skipped: dict[str, str]


def smoothquant_scales(input_absmax: Columns, weight_absmax: Columns, alpha: float) -> Columns:
    """Return `max |X_j|^alpha / max |W_j|^(1 - alpha)`."""
    w = exact(weight_absmax)
    x = input_absmax.to(w)
    usable = (x > 0) & (w > 0)
    return torch.where(usable, x**alpha / torch.where(usable, w, 1) ** (1 - alpha), 1).float()


def awq_scales(magnitude: Columns, exponent: float) -> Columns:
    """Return `mean |X_j|^a`, with the geometric mean of the largest and the smallest at 1."""
    usable = magnitude > 0
    s = torch.where(usable, exact(magnitude), 1) ** exponent
    centre = (s[usable].max() * s[usable].min()).sqrt() if usable.any() else torch.ones_like(s[0])
    return torch.where(usable, s / centre, 1).float()


def output_error(difference: Matrix, inputs: Float[Tensor, "rows in"]) -> float:
    """Return `|X D^T|^2`."""
    return exact(inputs.float() @ difference.float().T).square().sum().item()


@torch.no_grad()
def smooth(
    model: PreTrainedModel,
    spec: Smoothing,
    ranges: Mapping[str, Ranges],
    scheme_for: Callable[[str], WeightScheme | None],
    progress: Progress = silent,
) -> Smoothed:
    """Smooth a working copy in fp32 or fp64, in place; without clipping, what it computes stays the same.
    ranges: from `collect_ranges` on this model as it is. Only new parameters are made: another model that
    shares the old ones keeps them. Raises BitassayError for a model in 16 bits, and where the logits change
    although they must not."""
    if model.dtype not in (torch.float32, torch.float64):
        raise BitassayError(
            f"smoothing: the model is in {model.dtype}, in which folds would change it", "load it in float32"
        )
    folds, skipped = find_folds(model, spec.places)
    scales = {}
    with unchanged(model, "smoothed", "smoothing steps", "places one at a time, or no smoothing"):
        for done, where in enumerate(folds):
            progress(f"smoothing by {spec.method}", done, len(folds))
            if spec.method == "smoothquant":
                wanted = _smoothquant_fold(model, where, ranges, spec.alpha)
            else:
                wanted = _awq_fold(model, where, ranges, scheme_for, spec.exponents)
            scales[where.producer] = fold(model, where, wanted)
    if spec.clip:
        for where in folds:
            spread = where.spread(scales[where.producer])
            for name in where.readers:
                scheme = scheme_for(name)
                if scheme is not None and not name.endswith(UNCLIPPED):
                    inputs = ranges[name].sample / spread.to(ranges[name].sample)
                    Weight(model, f"{name}.weight").change(partial(_clipped_exactly, inputs, scheme))
    progress(f"smoothing by {spec.method}", len(folds), len(folds))
    return Smoothed(scales, skipped)


def _smoothquant_fold(
    model: PreTrainedModel, where: Fold, ranges: Mapping[str, Ranges], alpha: float
) -> Float[Tensor, " own"]:
    each = [Weight(model, f"{name}.weight").read().abs().amax(0) for name in where.readers]
    largest = torch.stack(each).amax(0)
    inputs = ranges[where.readers[0]].absmax.to(largest)
    return smoothquant_scales(where.share(inputs), where.share(largest), alpha)


def _awq_fold(
    model: PreTrainedModel,
    where: Fold,
    ranges: Mapping[str, Ranges],
    scheme_for: Callable[[str], WeightScheme | None],
    exponents: int,
) -> Float[Tensor, " own"]:
    schemes = [(name, scheme) for name in where.readers if (scheme := scheme_for(name)) is not None]
    with present(model, *where.readers):
        weights = {name: Weight(model, f"{name}.weight").read().float() for name in where.readers}
    seen = ranges[where.readers[0]]
    like = weights[where.readers[0]]
    magnitude, inputs = where.share(seen.mean_magnitude.to(like)), seen.sample.to(like)
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(exponents):
        scales = awq_scales(magnitude, step / exponents)
        s = where.spread(scales)
        error = sum(
            output_error(_rounded(weights[name] * s, scheme, name) / s - weights[name], inputs)
            for name, scheme in schemes
        )
        if error < least:
            best, least = scales, error
    return best


def _clipped_exactly(inputs: Float[Tensor, "rows in"], scheme: WeightScheme, weight: Matrix) -> Matrix:
    value = weight.float()
    return clipped(value, inputs.to(value), scheme)


def clipped(weight: Matrix, inputs: Float[Tensor, "rows in"], scheme: WeightScheme) -> Matrix:
    """Return the weights, each group clamped where rounding costs its part of the output least."""
    granularity = Granularity.parse("channel" if scheme.granularity == "tensor" else scheme.granularity)
    groups = granularity.to_groups(weight)
    largest = granularity.from_groups([group.abs().amax(1, keepdim=True) for group in groups], len(weight))

    def clamped(share: float | Float[Tensor, "out groups"]) -> Matrix:
        bound = widened(granularity, largest * share, weight.shape)
        return weight.clamp(-bound, bound)

    differences = (_rounded(clamped(share), scheme, "weight") - weight for share in CLIP_SHARES)
    errors = [_group_errors(difference, inputs, granularity) for difference in differences]
    # Of equals the first: the one that clips less.
    return clamped(weight.new_tensor(CLIP_SHARES)[torch.stack(errors).argmin(0)])


def _group_errors(
    difference: Matrix, inputs: Float[Tensor, "rows in"], granularity: Granularity
) -> Float[Tensor, "out groups"]:
    errors = []
    for start, stop, size in granularity.spans(difference.shape[1]):
        d = difference[:, start:stop].unflatten(1, (-1, size))
        x = inputs[:, start:stop].unflatten(1, (-1, size))
        gram = torch.einsum("tgi,tgj->gij", x, x)
        errors.append((torch.einsum("ogi,gij->ogj", d, gram) * d).sum(2))
    return torch.cat(errors, 1)


def _rounded(weight: Matrix, scheme: WeightScheme, name: str) -> Matrix:
    return quantize_tensor(weight, scheme, name).dequantize()

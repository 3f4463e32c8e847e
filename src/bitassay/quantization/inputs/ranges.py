"""What the linears' inputs look like on calibration text, and the roundings that follow from that.

Extremes and mean squares are exact over all tokens. Percentiles, histograms and learning take SAMPLED_TOKENS
evenly spaced tokens of each linear, with all their columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError, suggestion
from bitassay.models.cache import last_logits
from bitassay.models.hooks import hooked, reading
from bitassay.models.lockstep import Forward, in_step
from bitassay.models.opened import parameter_of
from bitassay.models.walk import walk
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.inputs.thresholds import (
    Span,
    kl_threshold,
    learned_threshold,
    moving_average,
    percentile_span,
    percentile_threshold,
)
from bitassay.quantization.recipe.formats import NumberFormat
from bitassay.quantization.recipe.inputs import Activations, InputScheme, OutlierColumns
from bitassay.quantization.shapes import Columns, Matrix
from bitassay.record.progress import Progress, silent

SAMPLED_TOKENS = 256
SAMPLING = ("percentile", "kl", "learned")  # the scales that look at the sample


@dataclass(frozen=True)
class Ranges:
    """The inputs of one linear over all calibration tokens; the sample is in the model's dtype. batches: one
    where extremes of each were not wanted."""

    batch_low: Float[Tensor, "batches in"]
    batch_high: Float[Tensor, "batches in"]
    mean: Columns
    mean_square: Columns
    mean_magnitude: Columns
    sample: Float[Tensor, "sampled in"]

    @property
    def absmax(self) -> Columns:
        """The largest magnitude in each column."""
        return torch.maximum(self.batch_high.amax(0), -self.batch_low.amin(0))

    @property
    def deviation(self) -> float:
        """The standard deviation of all inputs."""
        mean, mean_square = self.mean.double().mean(), self.mean_square.double().mean()
        return (mean_square - mean.square()).clamp(min=0).sqrt().item()


@torch.no_grad()
def collect_ranges(
    model: PreTrainedModel,
    batches: Int[Tensor, "batches tokens"] | Sequence[Int[Tensor, "_ _"]],
    names: Sequence[str] | None = None,
    progress: Progress = silent,
    *,
    each_batch: bool = True,
    sampled: int = SAMPLED_TOKENS,
) -> dict[str, Ranges]:
    """Run the model on each batch (a row of token ids, or several) and watch the inputs of the decoder
    layers' linears, or of those in `names`. each_batch: keep the extremes of every batch; sampled: about how
    many tokens' inputs are kept. Layers of an opened model are read once. Raises BitassayError where an input
    is not finite."""
    if isinstance(batches, Tensor):
        batches = [row[None] for row in batches]
    linears = walk(model).linears
    quota = -(-sampled // len(batches))
    chosen = linears if names is None else names
    watched = {name: _Watch(linears[name].in_features, each_batch, quota) for name in chosen}
    modules = {name: linears[name] for name in watched}

    def run(batch: Int[Tensor, "_ _"]) -> None:
        with torch.no_grad():
            model(batch.to(model.device), use_cache=False, **last_logits(model, 1))

    with hooked(reading(modules, lambda name, x: watched[name].add(x))):
        # A linear sees batch after batch, whatever else runs in between.
        for done, _ in enumerate(in_step([Forward(model, partial(run, batch)) for batch in batches])):
            progress("reading calibration text", done, len(batches))
    progress("reading calibration text", len(batches), len(batches))
    return {name: watch.ranges(name) for name, watch in watched.items()}


class _Watch:
    def __init__(self, features: int, each_batch: bool, quota: int):
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []
        self.sampled: list[Tensor] = []
        self.total = torch.zeros(features, dtype=torch.float64)
        self.square = torch.zeros_like(self.total)
        self.magnitude = torch.zeros_like(self.total)
        self.count, self.each_batch, self.quota = 0, each_batch, quota

    def add(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        if not len(tokens):  # an expert that this batch did not reach
            return
        x = tokens.float()
        self.low.append(x.amin(0).cpu())
        self.high.append(x.amax(0).cpu())
        if not self.each_batch:
            self.low = [torch.stack(self.low).amin(0)]
            self.high = [torch.stack(self.high).amax(0)]
        self.total += x.sum(0).cpu()
        self.square += x.square().sum(0).cpu()
        self.magnitude += x.abs().sum(0).cpu()
        self.count += len(tokens)
        picked = torch.linspace(0, len(tokens) - 1, min(self.quota, len(tokens))).round().long()
        self.sampled.append(tokens[picked.to(tokens.device)].cpu())

    def ranges(self, name: str) -> Ranges:
        if not self.count:
            raise BitassayError(f"{name}: no calibration token reached it", "calibrate on more samples")
        if not self.square.isfinite().all():
            raise BitassayError(f"{name}: its inputs are not finite on the calibration text")
        mean, square, magnitude = (
            t.div(self.count).float() for t in (self.total, self.square, self.magnitude)
        )
        low, high, sample = torch.stack(self.low), torch.stack(self.high), torch.cat(self.sampled)
        return Ranges(low, high, mean, square, magnitude, sample)


def input_roundings(
    model: PreTrainedModel, spec: Activations, ranges: Mapping[str, Ranges] | None = None
) -> dict[str, InputRounding]:
    """Return what `spec` comes to for each linear of the decoder layers, by name. ranges: of this model with
    its final weights and norms, needed where `spec.needs_text`. Raises BitassayError for an override that
    matches nothing, and for fused experts, whose inputs no linear sees."""
    parts, kind = walk(model), type(model).__name__
    names = [*parts.linears, *parts.experts]
    for override in spec.overrides:
        if not any(spec.override_for(name) is override for name in names):
            globs = {f"*.{name.rpartition('.')[2]}" for name in names}
            raise BitassayError(
                f"activations: the override {override.match!r} applies to no linear of {kind}; "
                f"{suggestion(override.match, globs)}",
                "match full names with a glob, such as '*.down_proj'; the first match wins",
            )
    if experts := [name for name in parts.experts if spec.scheme_for(name) is not None]:
        raise BitassayError(
            f"{kind} has fused experts, whose inputs cannot be rounded, such as {experts[0]}",
            "leave them as they are: activations: {overrides: [{match: '*.experts.*', inputs: null}]}",
        )
    schemes = {name: scheme for name in parts.linears if (scheme := spec.scheme_for(name)) is not None}
    for name, scheme in schemes.items():
        if scheme.needs_calibration and name not in (ranges or {}):
            raise BitassayError(
                f"activations: {name} has no calibration, which scale: {scheme.scale} "
                f"{'and outliers need' if scheme.outliers else 'needs'}",
                "add a calibration part to the recipe, or use scale: dynamic",
            )
    return {
        name: rounding_from(
            scheme,
            (ranges or {}).get(name),
            parameter_of(model, f"{name}.weight")
            if scheme.scale == "learned"  # others do not look at it
            else parts.linears[name].weight,
        )
        for name, scheme in schemes.items()
    }


@torch.no_grad()
def rounding_from(scheme: InputScheme, ranges: Ranges | None, weight: Matrix) -> InputRounding:
    """Return the rounding of one linear; thresholds are those of the columns that are no outliers."""
    if ranges is None or (outliers := scheme.outliers) is None:
        columns: tuple[int, ...] = ()
    else:
        columns = outlier_columns(ranges, outliers)
    rounding = InputRounding(scheme.format, scheme.symmetric, outliers=columns)
    if scheme.scale == "dynamic":
        return replace(rounding, scale_factor=scheme.scale_factor)
    assert ranges is not None
    kept = torch.ones(len(ranges.absmax), dtype=torch.bool)
    kept[list(columns)] = False
    fmt = rounding.number_format
    if scheme.symmetric:
        threshold = _threshold(scheme, ranges, kept, weight, fmt)
        return replace(rounding, scale=_float32(threshold / fmt.largest * scheme.scale_factor))
    span, (_, qmax) = _span(scheme, ranges, kept), fmt.code_range(symmetric=False)
    scale = (span.high - span.low) / qmax
    zero_point = min(qmax, round(-span.low / _float32(scale)))
    return replace(rounding, scale=_float32(scale * scheme.scale_factor), zero_point=zero_point)


def outlier_columns(ranges: Ranges, rule: OutlierColumns) -> tuple[int, ...]:
    """Return the columns that stay in 16 bits, in order; never all of them."""
    absmax = ranges.absmax
    if rule.sigma is not None:
        limit = rule.sigma * ranges.deviation
    else:
        assert rule.percentile is not None
        limit = percentile_threshold(absmax, rule.percentile)
    columns = (absmax > limit).nonzero()[:, 0].tolist()
    return tuple(columns) if len(columns) < len(absmax) else ()


def _threshold(scheme: InputScheme, ranges: Ranges, kept: Tensor, weight: Tensor, fmt: NumberFormat) -> float:
    sample = ranges.sample[:, kept]
    if scheme.scale == "percentile":
        return percentile_threshold(sample, scheme.percentile)
    if scheme.scale == "kl":
        return kl_threshold(sample, levels=fmt.code_range(symmetric=True)[1] + 1)
    if scheme.scale == "learned":
        return learned_threshold(sample, weight.float().square().sum(0).cpu()[kept], fmt)
    low, high = ranges.batch_low[:, kept].amin(1), ranges.batch_high[:, kept].amax(1)
    maxima = torch.maximum(high, -low).tolist()
    return max(maxima) if scheme.scale == "absmax" else moving_average(maxima, scheme.momentum)


def _span(scheme: InputScheme, ranges: Ranges, kept: Tensor) -> Span:
    if scheme.scale == "percentile":
        return percentile_span(ranges.sample[:, kept], scheme.percentile)
    lows = ranges.batch_low[:, kept].amin(1).clamp(max=0).tolist()
    highs = ranges.batch_high[:, kept].amax(1).clamp(min=0).tolist()
    if scheme.scale == "absmax":
        return Span(min(lows), max(highs))
    return Span(moving_average(lows, scheme.momentum), moving_average(highs, scheme.momentum))


def _float32(scale: float) -> float:
    """As arithmetic in fp32 will read it; 1 where all inputs were zero."""
    return torch.tensor(scale if scale > 0 else 1.0, dtype=torch.float32).item()

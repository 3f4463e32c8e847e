"""Make what a recipe's `replication` asks for: `copies_by_layer`, which layers get how many copies, then
`with_copies`, the codes of these and the coefficients of the passes. Both become part of the `Quantization`;
`replicas.py` gives them to a model.
"""

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, matrices, walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.ranges import collect_ranges
from bitassay.quantization.recipe.replication import Chosen, ReplicationPlan, Steps
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.replication.fit import fit_passes
from bitassay.quantization.replication.select import chosen_layers
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.quantization.runtime.replicas import replica_names
from bitassay.quantization.shapes import Columns, Tokens
from bitassay.record.progress import Progress


def copies_by_layer(
    model: PreTrainedModel,
    plan: ReplicationPlan,
    schemes: Mapping[str, WeightScheme | None],
    tokens: Tokens | None,
    progress: Progress,
) -> dict[int, int]:
    """Return the number of copies of each layer that gets several, before `schemes` quantize `model`."""
    counts = plan.known_counts(len(decoder_layers(model)))
    if counts is not None:
        return counts
    assert isinstance(plan.layers, Chosen)
    chosen = chosen_layers(model, schemes, plan.layers, tokens, progress)
    progress(f"layers with copies, by {plan.layers.by}: {', '.join(map(str, chosen))}")
    return dict.fromkeys(chosen, plan.copies)


def with_copies(
    base: PreTrainedModel,
    made: Quantization,
    plan: ReplicationPlan,
    before: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    counts: Mapping[int, int],
    tokens: Tokens | None,
    progress: Progress,
) -> Quantization:
    """Return `made` with the codes of layers' copies and the coefficients of their passes. `before` is the
    model as it was when its matrices were quantized; `schemes` are those of the recipe."""
    if not plan.at_run_time:
        return made
    tensors = dict(made.tensors)
    if plan.makes_codes:
        importance = _importance(base, made, tokens, progress)
        tensors |= _codes_of_copies(before, plan, schemes, counts, importance, progress)
    known = plan.coefficients != "fitted"
    passes = {
        index: plan.steps(count) if known else Steps((1.0,) * count, (1.0,) * count)
        for index, count in counts.items()
    }
    made = replace(made, tensors=tensors, passes=passes)
    if known:
        return made
    assert tokens is not None
    return replace(made, passes=fit_passes(with_tensors(base, made), before, tokens, progress))


def _importance(
    base: PreTrainedModel, made: Quantization, tokens: Tokens | None, progress: Progress
) -> dict[str, Columns]:
    """Return what weighs the columns of copies, the mean squared inputs behind the quantized layers, as it
    weighed the first copy; nothing without calibration text."""
    if made.recipe.calibration is None:
        return {}
    assert tokens is not None
    ranges = collect_ranges(with_tensors(base, replace(made, inputs={})), tokens, progress=progress)
    return {name: seen.mean_square for name, seen in ranges.items()}


def _codes_of_copies(
    before: PreTrainedModel,
    plan: ReplicationPlan,
    schemes: Mapping[str, WeightScheme | None],
    counts: Mapping[int, int],
    importance: Mapping[str, Columns],
    progress: Progress,
) -> dict[str, QuantizedTensor]:
    """Return the matrices of all copies but the layers themselves."""
    linears, weights, tensors = walk(before).linears, matrices(before), {}
    for done, (index, count) in enumerate(counts.items()):
        progress("quantizing copies", done, len(counts))
        copies = plan.of_matrices(count)
        for name, scheme in schemes.items():
            for number, replica in enumerate(replica_names(before, index, name, count), start=1):
                if scheme is None:
                    continue
                if name not in linears:
                    raise BitassayError(
                        f"{name}: copies of fused experts with codes of their own are not made",
                        "replication: {of: linear}, or copies that differ by nothing",
                    )
                of_copy = copies.scheme(scheme, number)
                tensors[replica] = quantize_tensor(weights[name], of_copy, replica, importance.get(name))
    return tensors

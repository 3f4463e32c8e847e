"""Make what a recipe's `replication` asks for: `choose_copies` says which layers get how many copies, before
codes are solved; `add_copies` adds the codes of further copies and the coefficients of the passes to the
`Quantization`, and `replicas.py` gives them to a model.
"""

from collections.abc import Mapping
from dataclasses import replace

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, matrices, walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.ranges import collect_ranges
from bitassay.quantization.recipe.replication import Chosen, ReplicationPlan, Steps
from bitassay.quantization.replication.fit import fit_passes
from bitassay.quantization.replication.select import chosen_layers
from bitassay.quantization.runtime.model import Quantization, copy_sharing_parameters, with_tensors
from bitassay.quantization.runtime.replicas import replica_names
from bitassay.quantization.shapes import Columns
from bitassay.quantization.solvers.sensitivity import matrix_locations
from bitassay.quantization.work import WorkingCopy


def choose_copies(work: WorkingCopy, plan: ReplicationPlan) -> None:
    """Decide which layers have copies; merged copies, or the first copy of a layer, are what is solved."""
    if plan.changes_nothing:
        return

    def counts() -> dict[str, int]:
        known = plan.known_counts(len(decoder_layers(work.model)))
        if known is None:
            assert isinstance(plan.layers, Chosen)
            chosen = chosen_layers(work.model, work.schemes, plan.layers, work.tokens, work.progress)
            work.progress(f"layers with copies, by {plan.layers.by}: {', '.join(map(str, chosen))}")
            known = dict.fromkeys(chosen, plan.copies)
        return {str(index): count for index, count in known.items()}

    kept = counts() if work.folder is None else work.folder.part("copies", counts)
    work.copies = {int(index): count for index, count in kept.items()}
    work.uncopied = replace(work, model=copy_sharing_parameters(work.model))
    if not plan.makes_codes:
        return
    locations, work.schemes = matrix_locations(work.model), dict(work.schemes)
    for name, scheme in work.schemes.items():
        if scheme is not None and (count := work.copies.get(locations[name].layer)) is not None:
            copies = plan.of_matrices(count)
            merged = plan.of == "linear"
            work.schemes[name] = scheme.with_copies(copies) if merged else copies.scheme(scheme, 0)


def add_copies(work: WorkingCopy, plan: ReplicationPlan, made: Quantization) -> Quantization:
    """Return `made` with the codes of layers' copies and the coefficients of their passes."""
    if work.uncopied is None or not work.copies:
        return made
    if plan.averages_inputs:
        layers = {name: location.layer for name, location in matrix_locations(work.base).items()}
        inputs = {n: replace(r, copies=work.copies.get(layers[n], 1)) for n, r in made.inputs.items()}
        made = replace(made, inputs=inputs)
    if not plan.at_run_time:
        return made
    if plan.makes_codes:
        further = _codes_of_copies(work, work.uncopied, plan, _importance(work, made))
        made = replace(made, tensors={**made.tensors, **further})
    if plan.coefficients != "fitted":
        return replace(made, passes={index: plan.steps(count) for index, count in work.copies.items()})
    plain = {index: Steps((1.0,) * count, (1.0,) * count) for index, count in work.copies.items()}
    model = with_tensors(work.base, replace(made, passes=plain))
    return replace(made, passes=fit_passes(model, work.uncopied.model, work.text, work.progress))


def _importance(work: WorkingCopy, made: Quantization) -> dict[str, Columns]:
    """Return the mean squared inputs, which weighed the first copy too; nothing without calibration."""
    if work.recipe.calibration is None:
        return {}
    model = with_tensors(work.base, replace(made, inputs={}))
    ranges = collect_ranges(model, work.text, progress=work.progress)
    return {name: seen.mean_square for name, seen in ranges.items()}


def _codes_of_copies(
    work: WorkingCopy, before: WorkingCopy, plan: ReplicationPlan, importance: Mapping[str, Columns]
) -> dict[str, QuantizedTensor]:
    linears, weights, tensors = walk(before.model).linears, matrices(before.model), {}
    for done, (index, count) in enumerate(work.copies.items()):
        work.progress("quantizing copies", done, len(work.copies))
        copies = plan.of_matrices(count)
        for name, scheme in before.schemes.items():
            for number, replica in enumerate(replica_names(before.model, index, name, count), start=1):
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

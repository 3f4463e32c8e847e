"""Where a model is sensitive: statistics, errors and divergences of every matrix and layer under a recipe.

Each matrix is rounded to nearest by the scheme that the recipe has for it, whatever else the recipe would do;
what is measured is how hard the numbers are to round, and what the rest of the model makes of the error.

    weights, inputs    `statistics.py`: moments, outlier columns, massive values
    hidden             the same of what each decoder layer puts out
    weight_error       ||W' - W|| / ||W||
    output_error       ||x (W' - W)^T|| / ||x W^T|| on calibration text
    kl_predicted       what the output error does to predictions, in nats a token (`sensitivity.py`)
    kl                 measured, when only one layer is quantized, or, if asked for, one matrix (all slices of
                       one fused parameter together)
    routing            of mixtures: tokens of each expert, and the fraction of tokens whose set of experts
                       is another once everything is quantized

The text is calibration text, never one that quality is measured on. Finished windows are kept in the run
folder, and the same command goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers, fused_experts, matrices
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.pipeline import rounded_to_nearest
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.experts import changed_fraction, routes
from bitassay.quantization.runtime.model import Quantization, check_recipe, with_tensors
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.sensitivity import (
    NOTHING_ELSE,
    Location,
    OutputError,
    divergences,
    matrix_locations,
    observe,
    predicted_divergences,
)
from bitassay.quantization.weight_statistics import Statistics
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan

ALL = "all"
Row = dict[str, Any]


@dataclass(frozen=True)
class AnalysisPlan:
    """text: what is measured on. each_matrix: also measure the divergence of every matrix, one run each."""

    text: Calibration = field(default_factory=lambda: Calibration(samples=8, tokens=512))
    each_matrix: bool = False


def analyze(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: AnalysisPlan | None = None,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Return the analysis as a value, and the run folder that holds it as `run.json`. Raises BitassayError
    where the recipe does not fit the model or the folder holds something else."""
    plan = plan or AnalysisPlan()
    weights, known = check_recipe(model, recipe), identity(model)
    described = {
        "model": {"name": known.name, "weights_digest": known.weights_digest, "dtype": str(model.dtype)},
        "recipe": {"name": recipe.name, "id": recipe.recipe_id},
        "text": plan.text.model_dump(),
    }
    work = {**described, "each_matrix": plan.each_matrix}
    name = f"analysis-{known.name}-{recipe.name}"
    folder = open_run_folder(name, run_plan("analysis", work), out)
    tokens = calibration_tokens(model, plan.text)
    schemes = {name: recipe.scheme_for(name) for name in weights}
    names = [name for name, scheme in schemes.items() if scheme is not None]
    if not names:
        raise BitassayError(f"recipe {recipe.name} quantizes nothing in {known.name}", "another recipe")
    tensors = cache(lambda: rounded_to_nearest(model, schemes, "rounding to nearest", progress))
    statistics = folder.part("statistics", lambda: _statistics(model, tensors(), tokens, progress))
    divergence = _divergences(model, names, tensors, tokens, plan, folder, progress)
    run = write_run(
        folder,
        **described,
        environment=environment(model.device),
        settings={"each_matrix": plan.each_matrix},
        whole=statistics["whole"] | _mean("kl", divergence[ALL]),
        layers=_layers(statistics, divergence, matrix_locations(model)),
        matrices=_matrices(statistics["matrices"], divergence),
        routing=folder.part("routing", lambda: _routing(model, tensors(), tokens, progress)),
    )
    return run, folder.path


def _statistics(
    model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor], tokens: Tokens, progress: Progress
) -> dict[str, Any]:
    views, where, count = matrices(model), matrix_locations(model), len(tokens)
    errors = OutputError(model, {name: [tensor] for name, tensor in tensors.items()})
    inputs = {name: Statistics(tensor.shape[1]) for name, tensor in tensors.items()}
    hidden: dict[int, Statistics] = {}

    def tap(name: str, x: Float[Tensor, "rows _"]) -> None:
        errors(name, x)
        if name in inputs:
            inputs[name].add(x)

    def leaves(index: int, y: Any) -> None:
        states = (y[0] if isinstance(y, tuple) else y).flatten(0, -2)
        hidden.setdefault(index, Statistics(states.shape[-1])).add(states)

    with hooked(
        layer.register_forward_hook(lambda _, arguments, y, index=index: leaves(index, y))
        for index, layer in enumerate(decoder_layers(model))
    ):
        observe(model, tokens, tap, lambda done: progress("inputs and outputs", done, count))
    candidates = {name: [tensor] for name, tensor in tensors.items()}
    predicted = predicted_divergences(
        model, candidates, tokens, lambda done: progress("predicting divergences", done, count)
    )
    rows = []
    for name, tensor in tensors.items():
        weight, relative, size = views[name].float(), errors.relative(name), tensor.shape[0] * tensor.shape[1]
        of_weight = Statistics(tensor.shape[1])
        of_weight.add(weight)
        rows.append(
            {
                "name": name,
                **where[name]._asdict(),
                "shape": list(tensor.shape),
                "bits": tensor.stored_bits / size,
                "tokens": errors.rows[name],
                "weight_error": float((tensor.dequantize() - weight).norm() / weight.norm().clamp(min=1e-38)),
                "output_error": None if relative is None else relative[0] ** 0.5,
                "kl_predicted": predicted[name][0],
                **of_weight.summary("weight_"),
                **(inputs[name].summary("input_") if inputs[name].count else {}),
            }
        )
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values())
    bits = sum(tensor.stored_bits for tensor in tensors.values())
    totals = {"bits_per_weight": bits / weights, "matrices": len(tensors)}
    return {
        "whole": totals,
        "matrices": rows,
        "hidden": [hidden[index].summary("hidden_") for index in sorted(hidden)],
    }


def _divergences(
    model: PreTrainedModel,
    names: Sequence[str],
    tensors: Callable[[], Mapping[str, QuantizedTensor]],
    tokens: Tokens,
    plan: AnalysisPlan,
    folder: RunFolder,
    progress: Progress,
) -> dict[str, list[float]]:
    """For each group of matrices, the mean divergence of each window; a window is a part of the run."""
    groups, where = {ALL: list(names)}, matrix_locations(model)
    for name in names:
        groups.setdefault(_label(where[name].layer), []).append(name)
        if plan.each_matrix:
            groups.setdefault(_label(*where[name]), []).append(name)
    total = len(groups) * len(tokens)

    def of_window(number: int) -> dict[str, float]:
        measured, known = {}, tensors()
        codes = {label: {name: known[name] for name in members} for label, members in groups.items()}
        for label, divergence in divergences(model, codes, tokens[number]):
            measured[label] = divergence
            progress("measuring divergences", number * len(groups) + len(measured), total)
        return measured

    windows = [
        folder.part(f"divergences-{number:04d}", lambda number=number: of_window(number))
        for number in range(len(tokens))
    ]
    return {label: [window[label] for window in windows] for label in groups}


def _label(layer: int, kind: str = "") -> str:
    return f"{layer} {kind}".rstrip()


def _mean(name: str, windows: list[float]) -> Row:
    """The mean over windows, and its standard error where there is more than one."""
    values = np.array(windows)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_se": None if error is None else float(error)}


def _layers(
    statistics: Mapping[str, Any], divergence: Mapping[str, list[float]], where: Mapping[str, Location]
) -> list[Row]:
    rows = []
    for index, hidden in enumerate(statistics["hidden"]):
        in_layer = [row for row in statistics["matrices"] if where[row["name"]].layer == index]
        measured = _mean("kl", divergence[_label(index)]) if in_layer else {"kl": 0.0, "kl_se": None}
        predicted = sum(row["kl_predicted"] for row in in_layer)
        rows.append({"layer": index, **measured, "kl_predicted": predicted, **hidden})
    return rows


def _matrices(rows: list[Row], divergence: Mapping[str, list[float]]) -> list[Row]:
    measured = {row["name"]: divergence.get(_label(row["layer"], row["kind"])) for row in rows}
    return [
        row | {"kl": None if (kl := measured[row["name"]]) is None else float(np.mean(kl))} for row in rows
    ]


def _routing(
    model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor], tokens: Tokens, progress: Progress
) -> list[Row]:
    """For each module of experts, its load, and the tokens that go elsewhere once everything is quantized."""
    modules = fused_experts(model)
    if not modules:
        return []
    progress("comparing the experts of every token")
    quantized = with_tensors(model, Quantization(NOTHING_ELSE, dict(tensors)))
    pairs = [[routes(m, sample[None], list(modules)) for m in (model, quantized)] for sample in tokens]
    rows = []
    for name, module in modules.items():
        base, other = (torch.cat([pair[side][name] for pair in pairs]) for side in (0, 1))
        load = torch.bincount(base.flatten(), minlength=module.get_parameter("down_proj").shape[0])
        rows.append(
            {
                "module": name,
                "tokens": len(base),
                "experts_per_token": base.shape[1],
                "load": load.tolist(),
                "fewest_tokens": int(load.min()),
                "largest_share": float(load.max() / load.sum()),
                "changed_fraction": changed_fraction(base, other),
            }
        )
    return rows

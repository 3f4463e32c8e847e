"""What quantizing by a recipe will give, known from shapes alone: `plan_export`.
It is for `--dry-run` and whoever has to know before any weight is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, walk
from bitassay.quantization.codes.storage import Factors, Stored, expected_bytes, planned, planned_bits
from bitassay.quantization.export.opened_memory import (
    Sizes,
    base_bytes,
    decoding_copies,
    opened_memory,
    saving_memory,
    solving_memory,
    tuning_memory,
)
from bitassay.quantization.export.registry import LAYOUTS, OWN
from bitassay.quantization.export.reload import expected_parts
from bitassay.quantization.export.save import choose_layout
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import (
    check_recipe,
    fitted_to,
    obstacle_to_opening,
    parameter_count,
)
from bitassay.quantization.runtime.replicas import is_replica, original, replica_names

LOADED, OPENED = "as a whole", "a layer at a time"  # how a model is read


@dataclass(frozen=True)
class Plan:
    """What quantizing by a recipe will give, known from shapes alone.

    layout_reason: why it is our own layout where nobody asked for it. size_bytes: as
    `quantize.model.size_bytes` counts, and by the whole model's parameters. tensor_bytes: what the folder's
    tensors take. memory_bytes: the peak of the whole command, with the model loaded: the base model, the
    quantized one, its codes, and the reloaded model beside them; or, where that is more, what calibrating
    holds: the base model, what is quantized, and what one layer makes of the text; or what tuning holds of
    each weight. opened_memory_bytes: the same with the model read a layer at a time; None where a part of the
    recipe needs all of it. opened_codes_bytes: that until all codes are known. decoding_copies: how many
    copies of a matrix in fp32 decoding its codes takes. solves: whether layers are run to find codes.
    """

    layout: str
    layout_reason: str | None
    matrices: int
    bits_per_weight: float
    checkpoint_bits_per_weight: float
    size_bytes: int
    tensor_bytes: int
    memory_bytes: int
    opened_memory_bytes: int | None
    opened_codes_bytes: int | None
    decoding_copies: float
    solves: bool


def plan_export(model: PreTrainedModel, recipe: Recipe, layout: str | None = None) -> Plan:
    """Check that `recipe` fits `model` (perhaps on the meta device) and can be saved; else BitassayError."""
    recipe, _ = fitted_to(model, recipe)
    shapes, ways = planned_matrices(model, recipe)
    if not ways[0]:
        raise BitassayError(
            f"recipe {recipe.name} quantizes nothing in {type(model).__name__}",
            "another recipe; see `bitassay recipes list`",
        )
    layouts = [choose_layout(model, recipe, way, layout) for way in ways]
    chosen, why = next((choice for choice in layouts if choice[0] == OWN), layouts[0])
    # Of several ways, the one of the most bits; a budget of mixed bits stays below it.
    bits = max(sum(planned_bits(way[name], shapes[name]) for name in way) for way in ways)
    storing = LAYOUTS[chosen]
    if (spec := recipe.activations) is not None:
        ways = [
            {name: storing.with_inputs(stored, spec.scheme_for(name)) for name, stored in way.items()}
            for way in ways
        ]
    stored = max(expected_bytes(expected_parts(model, storing, way, shapes)) for way in ways)
    weights = sum(shapes[name][0] * shapes[name][1] for name in ways[0] if not is_replica(name))
    added = sum(count(model, part) for count, part in recipe.steps(ADDED_PARAMETERS))
    parameters, item = parameter_count(model) + added, model.dtype.itemsize
    saving = (2 * parameters + weights) * item + bits // 8 + stored
    originals = [name for name in ways[0] if not is_replica(name)]
    sizes = Sizes(model, recipe.text, [shapes[name] for name in originals], parameters, bits)
    memory = [saving, *(memory_of(part, sizes) for memory_of, part in recipe.steps(MEMORY))]
    weighs = any((scheme := recipe.scheme_for(name)) and scheme.uses_importance for name in originals)
    solves = recipe.is_calibrated and (recipe.uses_calibrated_solver or weighs)
    if solves:
        # The base model, its quantized matrices and, for tuning, these before they were rounded.
        copies = 4 * (parameters + weights * (1 if recipe.tune is None else 2)) + bits // 8
        memory.append(copies + solving_memory(sizes, recipe.learned))
    size_bytes = (parameters - weights) * 2 + bits // 8
    opened = None if obstacle_to_opening(recipe) else opened_memory(sizes, ways[0], recipe, solves)
    return Plan(
        layout=chosen,
        layout_reason=why,
        matrices=len(ways[0]),
        bits_per_weight=bits / weights,
        checkpoint_bits_per_weight=size_bytes * 8 / parameters,
        size_bytes=size_bytes,
        tensor_bytes=(parameters - weights) * item + stored,
        memory_bytes=base_bytes(model) + max(memory),
        opened_memory_bytes=None if opened is None else max(opened, saving_memory(sizes, ways[0])),
        opened_codes_bytes=opened,
        decoding_copies=max(map(decoding_copies, ways[0].values())),
        solves=solves,
    )


def planned_matrices(
    model: PreTrainedModel, recipe: Recipe
) -> tuple[dict[str, tuple[int, int]], list[dict[str, Stored]]]:
    """Return the shapes of matrices and their copies, and how those that are quantized will be stored, one
    way for each choice that mixed bits have. Raises BitassayError where `recipe` does not fit `model`."""
    recipe, _ = fitted_to(model, recipe)
    shapes = {name: (view.shape[0], view.shape[1]) for name, view in check_recipe(model, recipe).items()}
    ways = _planned(model, recipe, list(shapes))
    shapes |= {name: shapes[original(name)] for way in ways for name in way if is_replica(name)}
    return shapes, ways


def choose_way(ways: Mapping[str, int], memory: int | None, what: str, remedy: str = "") -> tuple[str, int]:
    """Return the first way whose peak in bytes fits into `memory` (None: what is free), and its peak. Raises
    BitassayError for a budget in which none fits: `what` does not, and `remedy` is one more thing to try."""
    budget = psutil.virtual_memory().available if memory is None else memory
    for way, needed in ways.items():
        if needed <= budget:
            return way, needed
    way, least = min(ways.items(), key=lambda item: item[1])
    if memory is None:
        return way, least
    raise BitassayError(
        f"{what} takes {least / 1e9:.1f} GB of memory ({way}), and {budget / 1e9:.1f} GB are allowed",
        f"--memory {math.ceil(least / 1e8) / 10}GB{remedy}",
    )


def _untied_head(model: PreTrainedModel, rotation: Rotation) -> int:
    """Return the size of a head that was the embedding, where a folded rotation makes a matrix of it."""
    if rotation.r1 != "folded" or rotation.layers == "none" or not model.config.tie_word_embeddings:
        return 0
    return model.get_input_embeddings().get_parameter("weight").numel()


def _input_scales(model: PreTrainedModel, smoothing: Smoothing) -> int:
    return sum(x.in_features for x in walk(model).linears.values()) if smoothing.at_run_time else 0


# What parts of a recipe cost besides codes: bytes of memory while they run, and parameters that they add.
MEMORY: dict[str, Callable[[Any, Sizes], int]] = {
    "tune": tuning_memory,
}
ADDED_PARAMETERS: dict[str, Callable[[PreTrainedModel, Any], int]] = {
    "rotation": _untied_head,
    "smoothing": _input_scales,
}


def _planned(model: PreTrainedModel, recipe: Recipe, names: list[str]) -> list[dict[str, Stored]]:
    """Return how matrices and copies will be stored, one way for each choice that mixed bits have."""
    spec = recipe.low_rank
    factors = Factors(rank=spec.rank, dtype=spec.dtype) if spec is not None and spec.rank else None
    return [
        {name: planned(scheme, factors) for name, scheme in _with_copies(model, recipe, way).items()}
        for way in recipe.possible_schemes(names)
    ]


def _with_copies(
    model: PreTrainedModel, recipe: Recipe, schemes: dict[str, WeightScheme]
) -> dict[str, WeightScheme]:
    """Add the schemes of all copies; where layers are chosen by a measure, of the first so many."""
    plan, layers, extended = recipe.coded_replication, len(decoder_layers(model)), dict(schemes)
    if plan is None:
        return extended
    for layer, count in enumerate(plan.counts(layers)):
        for name, scheme in schemes.items():
            replicas = replica_names(model, layer, name, count)
            if not replicas:
                continue
            copies = plan.of_matrices(count)
            if plan.of == "linear":
                extended[name] = scheme.with_copies(copies)
            else:
                names = [name, *replicas]
                extended |= {copy: copies.scheme(scheme, place) for place, copy in enumerate(names)}
    return extended

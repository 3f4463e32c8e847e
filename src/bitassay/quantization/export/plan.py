"""What quantizing by a recipe will give, known from shapes alone: `plan_export`, for `--dry-run` and whoever
has to know before any weight is read.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers, walk
from bitassay.quantization.codes.storage import Factors, Stored, expected_bytes, planned, planned_bits
from bitassay.quantization.export import compressed
from bitassay.quantization.export.reload import expected_parts
from bitassay.quantization.export.save import Layout, choose_layout
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import check_recipe, parameter_count
from bitassay.quantization.runtime.replicas import is_replica, original, replica_names
from bitassay.quantization.solvers import layerwise
from bitassay.quantization.solvers.tune import memory_of


@dataclass(frozen=True)
class Plan:
    """What quantizing by a recipe will give, known from shapes alone.

    layout_reason: why it is our own layout where nobody asked for it. size_bytes: as
    `quantize.model.size_bytes` counts, and by the whole model's parameters. tensor_bytes: what the folder's
    tensors take. memory_bytes: the base model, the quantized one, its codes twice (as kept and as stored),
    and the reloaded model beside them; or, where that is more, what calibrating holds: the base model, what
    is quantized, and what one layer makes of the text; or what tuning holds of each weight.
    """

    layout: Layout
    layout_reason: str | None
    matrices: int
    bits_per_weight: float
    checkpoint_bits_per_weight: float
    size_bytes: int
    tensor_bytes: int
    memory_bytes: int


def plan_export(model: PreTrainedModel, recipe: Recipe, layout: Layout | None = None) -> Plan:
    """Check that `recipe` fits `model` (which may be on the meta device) and that every matrix can be saved.
    Raises BitassayError where not.
    """
    shapes = {name: (view.shape[0], view.shape[1]) for name, view in check_recipe(model, recipe).items()}
    ways = _planned(model, recipe, list(shapes))
    shapes |= {name: shapes[original(name)] for way in ways for name in way if is_replica(name)}
    if not ways[0]:
        raise BitassayError(
            f"recipe {recipe.name} quantizes nothing in {type(model).__name__}",
            "another recipe; see `bitassay recipes list`",
        )
    layouts = [choose_layout(model, recipe, way, layout) for way in ways]
    chosen, why = next((found for found in layouts if found[0] == "bitassay"), layouts[0])
    # Of several ways, the one of the most bits; a budget of mixed bits stays below it.
    bits = max(sum(planned_bits(way[name], shapes[name]) for name in way) for way in ways)
    if chosen == "compressed-tensors" and (spec := recipe.activations) is not None:
        ways = [
            {name: compressed.with_inputs(stored, spec.scheme_for(name)) for name, stored in way.items()}
            for way in ways
        ]
    stored = max(expected_bytes(expected_parts(model, chosen, way, shapes)) for way in ways)
    weights = sum(shapes[name][0] * shapes[name][1] for name in ways[0] if not is_replica(name))
    added = _untied(model, recipe) + _input_scales(model, recipe)
    parameters, item = parameter_count(model) + added, model.dtype.itemsize
    saving = (2 * parameters + weights) * item + bits // 8 + 2 * stored
    calibrating = tuning = 0
    text, config = recipe.text, model.config.get_text_config()
    weighs = any((own := recipe.scheme_for(name)) and own.uses_importance for name in ways[0])
    if recipe.is_calibrated and (recipe.uses_calibrated_solver or weighs):
        widest = max(max(shapes[name]) for name in ways[0])
        streams = layerwise.LEARNED_STREAMS if recipe.learned is not None else 0
        passing = layerwise.memory_of(text.samples * text.tokens, config.hidden_size, widest, streams)
        calibrating = 4 * (parameters + weights) + bits // 8 + passing
    if recipe.tune is not None:
        learned = [shapes[name] for name in ways[0]]
        layers = len(decoder_layers(model))
        tuning = memory_of(
            recipe.tune, text.tokens, learned, layers, config.hidden_size, parameters, config.vocab_size
        )
    size_bytes = (parameters - weights) * 2 + bits // 8
    return Plan(
        layout=chosen,
        layout_reason=why,
        matrices=len(ways[0]),
        bits_per_weight=bits / weights,
        checkpoint_bits_per_weight=size_bytes * 8 / parameters,
        size_bytes=size_bytes,
        tensor_bytes=(parameters - weights) * item + stored,
        memory_bytes=max(saving, calibrating, tuning),
    )


def _planned(model: PreTrainedModel, recipe: Recipe, names: list[str]) -> list[dict[str, Stored]]:
    """How matrices will be stored, and those of copies; one way for each choice that mixed bits have."""
    spec, factors = recipe.low_rank, None
    if spec is not None and spec.rank:
        factors = Factors(rank=spec.rank, dtype=spec.dtype)
    given = {name: scheme for name in names if (scheme := recipe.scheme_for(name))}
    ways = [given]
    if recipe.mixed is not None and recipe.weights is not None:
        ways = [
            {name: choice if recipe.override_for(name) is None else scheme for name, scheme in given.items()}
            for choice in recipe.mixed.choices(recipe.weights)
        ]
    return [
        {name: planned(scheme, factors) for name, scheme in _with_copies(model, recipe, way).items()}
        for way in ways
    ]


def _with_copies(
    model: PreTrainedModel, recipe: Recipe, schemes: dict[str, WeightScheme]
) -> dict[str, WeightScheme]:
    """The schemes of all copies too; where layers are chosen by a measure, of the first so many."""
    plan, layers, found = recipe.replication, len(decoder_layers(model)), dict(schemes)
    if plan is None or not plan.makes_codes:
        return found
    for layer, count in enumerate(plan.counts(layers)):
        for name, scheme in schemes.items():
            replicas = replica_names(model, layer, name, count)
            if not replicas:
                continue
            copies = plan.of_matrices(count)
            if plan.of == "linear":
                found[name] = scheme.with_copies(copies)
            else:
                own = [name, *replicas]
                found |= {copy: copies.scheme(scheme, place) for place, copy in enumerate(own)}
    return found


def _untied(model: PreTrainedModel, recipe: Recipe) -> int:
    """Parameters of a head that was the embedding, and that a folded rotation makes a matrix of its own."""
    spec = recipe.rotation
    if spec is None or spec.r1 != "folded" or spec.layers == "none" or not model.config.tie_word_embeddings:
        return 0
    return model.get_input_embeddings().get_parameter("weight").numel()


def _input_scales(model: PreTrainedModel, recipe: Recipe) -> int:
    """Parameters by which linears divide their inputs at run time."""
    if recipe.smoothing is None or not recipe.smoothing.at_run_time:
        return 0
    return sum(linear.in_features for linear in walk(model).linears.values())

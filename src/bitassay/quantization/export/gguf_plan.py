"""What a GGUF file will take, known from shapes and schemes alone: `plan_gguf`."""

import math
from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.quantization.codes.storage import Stored
from bitassay.quantization.export.gguf_blocks import PLAIN_BITS, bits_of, planned_kind
from bitassay.quantization.export.gguf_file import check_gguf
from bitassay.quantization.export.gguf_round import bits_of_type
from bitassay.quantization.export.opened_memory import base_bytes, gguf_memory
from bitassay.quantization.export.plan import LOADED, OPENED, planned_matrices
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import parameter_count


@dataclass(frozen=True)
class GgufPlan:
    """bits_per_weight: of the quantized matrices, at most. tensor_bytes: of all tensors, at most. stored_as:
    how many matrices there are by scheme and type. without_type: one that no block type holds."""

    bits_per_weight: float
    tensor_bytes: int
    stored_as: Counter[str]
    without_type: str | None


def plan_gguf(model: PreTrainedModel, recipe: Recipe, embeddings: str | None = None) -> GgufPlan:
    """Check that llama.cpp runs such a model (perhaps on the meta device), and return what its file takes.
    Raises BitassayError for what is not written as GGUF."""
    check_gguf(model, recipe)
    shapes, ways = planned_matrices(model, recipe)
    kinds = {
        (stored, shapes[name][1]): None for way in ways for name, stored in way.items()
    }  # a scheme of a width at a time
    kinds = {key: planned_kind(*key) for key in kinds}
    plans = [_planned(way, shapes, kinds) for way in ways]
    bits, stored_as, without = max(plans, key=lambda plan: plan[0])
    weights = sum(math.prod(shapes[name]) for name in ways[0])
    others = 0
    for name, value in model.named_parameters():
        if name.removesuffix(".weight") in ways[0]:
            continue
        ends = value.ndim == 2 and value.shape[0] == model.config.get_text_config().vocab_size
        width = 32.0 if value.ndim == 1 else PLAIN_BITS
        if ends and embeddings is not None:
            width = bits_of_type(embeddings, value.shape[1])
        others += int(value.numel() * width / 8)
    return GgufPlan(bits / weights, int(bits / 8) + others, stored_as, without)


def base_memory(model: PreTrainedModel) -> dict[str, int]:
    """Return the peak in bytes of writing a model as it is, by the way in which it is read. It may be on the
    meta device."""
    loaded = base_bytes(model) + 2 * parameter_count(model) * model.dtype.itemsize
    return {LOADED: loaded, OPENED: gguf_memory(model)}


def check_llama_cpp(plan: GgufPlan) -> None:
    """Raise BitassayError for a recipe of which a matrix has no type in llama.cpp."""
    if plan.without_type is not None:
        raise BitassayError(
            f"llama.cpp has no type for {plan.without_type}, which the file would hold in 16 bits",
            "a recipe on llama.cpp's own grids: gguf-q2_0, gguf-q4_0, gguf-q1_0; see `bitassay recipes list`",
        )


def _planned(
    way: dict[str, Stored], shapes: dict[str, tuple[int, int]], kinds: dict
) -> tuple[float, Counter[str], str | None]:
    bits, stored_as, without = 0.0, Counter[str](), None
    for name, stored in way.items():
        kind = kinds[stored, shapes[name][1]]
        scheme = f"{stored.scheme.format} {stored.scheme.granularity}"
        stored_as[f"{scheme} -> {'16 bits' if kind is None else kind.name}"] += 1
        if kind is None and without is None:
            without = f"{name} in {scheme}"
        bits += math.prod(shapes[name]) * (PLAIN_BITS if kind is None else bits_of(kind))
    return bits, stored_as, without

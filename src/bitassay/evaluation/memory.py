"""The memory that an evaluation takes, known from shapes alone: with its models loaded, and with their layers
read one at a time (`models/lockstep.py`)."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol
from bitassay.evaluation.quality import STATES_BYTES, state_bytes
from bitassay.models.config import text_config
from bitassay.models.walk import matrices
from bitassay.quantization.export.opened_memory import BASE_BYTES, Shapes
from bitassay.quantization.export.plan import LOADED, OPENED, Plan, plan_export
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import obstacle_to_opening, parameter_count

LOGITS = 3  # copies of a window's: the base model's, a candidate's, and what either leaves


def plans_of(model: PreTrainedModel, recipes: Sequence[Recipe]) -> list[Plan]:
    """Return what quantizing by each of the recipes will give that quantize something."""
    names = list(matrices(model))
    return [plan_export(model, recipe) for recipe in recipes if any(map(recipe.scheme_for, names))]


def memory_of(
    models: Sequence[PreTrainedModel], recipes: Sequence[Recipe], protocol: Protocol
) -> dict[str, int]:
    """Return the peak in bytes of evaluating `models`, of which recipes change the first, by the way in which
    they are read. They may be on the meta device."""
    base, tokens = models[0], protocol.window_tokens
    item, count = base.dtype.itemsize, len(models) + len(recipes)
    shapes = [Shapes.of(model) for model in models]
    logits = LOGITS * tokens * text_config(base).vocab_size * item
    passing = 4 * tokens * 3 * max(each.widest for each in shapes)
    weights = sum(parameter_count(model) for model in models) + len(recipes) * parameter_count(base)
    plans = plans_of(base, recipes)
    ways = {LOADED: BASE_BYTES + weights * item + logits + passing}
    ways[LOADED] = max([ways[LOADED], *(plan.memory_bytes for plan in plans if plan.solves)])
    if not any(map(obstacle_to_opening, recipes)):
        state = state_bytes(base, tokens, count)
        states = min((protocol.windows or STATES_BYTES) * state, max(STATES_BYTES, state))
        layer = max(item * each.layer + each.decoding for each in shapes) + passing
        head = item * max(each.beside for each in shapes) + logits
        opened = BASE_BYTES + states + max(layer, head)
        ways[OPENED] = max([opened, *(plan.opened_memory_bytes or 0 for plan in plans)])
    return ways

"""The memory that an evaluation takes, known from shapes alone: with its models loaded, and with their layers
read one at a time (`models/lockstep.py`)."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol, tokenizing_bytes
from bitassay.evaluation.divergence import ROWS
from bitassay.evaluation.quality import STATES_BYTES, state_bytes
from bitassay.models.config import text_config
from bitassay.models.walk import matrices
from bitassay.quantization.export.opened_memory import BASE_BYTES, READING_COPIES, Shapes, base_bytes
from bitassay.quantization.export.plan import LOADED, OPENED, Plan, plan_export
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import obstacle_to_opening, parameter_count

THREAD_BYTES = 9 * 10**6  # that products in fp32 keep for each thread, so for each forward in step: MKL's
LOGITS, ROW_COPIES = 2, 6  # copies of a window's, the base model's and a candidate's; of ROWS of them in fp32


def plans_of(model: PreTrainedModel, recipes: Sequence[Recipe]) -> list[Plan]:
    """Return what quantizing by each of the recipes will give that quantize something."""
    names = list(matrices(model))
    return [plan_export(model, recipe) for recipe in recipes if any(map(recipe.scheme_for, names))]


def memory_of(
    models: Sequence[PreTrainedModel], recipes: Sequence[Recipe], protocol: Protocol
) -> dict[str, int]:
    """Return the peak in bytes of evaluating `models`, of which recipes change the first, by the way in which
    they are read. They may be on the meta device."""
    base, tokens, names = models[0], protocol.window_tokens, matrices(models[0])
    item, count = base.dtype.itemsize, len(models) + len(recipes)
    start = sum(map(base_bytes, models)) - BASE_BYTES * (len(models) - 1)
    shapes = [Shapes.of(model) for model in models]
    logits = (min(LOGITS, count) * tokens * item + ROW_COPIES * 4 * ROWS) * text_config(base).vocab_size
    passing = 4 * tokens * 3 * max(each.widest for each in shapes)
    text = tokenizing_bytes(protocol.corpus)
    # A candidate has the base model's other parameters.
    changed = sum(view.numel() for recipe in recipes for n, view in names.items() if recipe.scheme_for(n))
    weights = sum(parameter_count(model) for model in models) + changed
    plans = plans_of(base, recipes)
    ways = {LOADED: start + max(text, weights * item + logits + passing)}
    ways[LOADED] = max([ways[LOADED], *(plan.memory_bytes for plan in plans if plan.solves)])
    if not any(map(obstacle_to_opening, recipes)):
        state = state_bytes(base, tokens, count)
        in_step = min(protocol.windows or STATES_BYTES, max(1, STATES_BYTES // state))
        states = in_step * (state + (count * THREAD_BYTES if item == 4 else 0))
        # Each candidate keeps the codes of the last layer that it read.
        codes = sum(int(plan.bits_per_weight * shapes[0].layer / 8) for plan in plans)
        copies = [READING_COPIES if _has_codes(model) else 1 for model in models]
        decoding = 4 * max([*copies, *(plan.decoding_copies for plan in plans)])
        layer = max(item * each.layer + max(passing, int((decoding - item) * each.matrix)) for each in shapes)
        head = item * max(each.beside for each in shapes) + logits
        opened = start + max(text, states + codes + max(layer, head))
        ways[OPENED] = max([opened, *(plan.opened_codes_bytes or 0 for plan in plans)])
    return ways


def _has_codes(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None

"""Whether an assay fits into a budget of memory, and how its models are read then, known before any work.

Quantizing and evaluating go a layer at a time where they must. Timing and verifying run loaded models in
16 bits: the base model and, of the quantized ones, all codes while they are timed, one while it proves.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError
from bitassay.evaluation.memory import memory_of, plans_of
from bitassay.models.config import text_config
from bitassay.quantization.export.opened_memory import base_bytes
from bitassay.quantization.export.plan import choose_way
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import parameter_count

ITEM = 2  # bytes of a parameter in the steps that run in 16 bits


def chosen_way(
    empty: PreTrainedModel,
    recipes: Sequence[Recipe],
    protocol: Protocol,
    memory: int | None,
    bench: bool,
    verify: bool,
) -> tuple[str, int]:
    """Return how the models are read that are quantized and evaluated, and the peak of that in bytes. empty:
    the model on the meta device, in the dtype of the evaluation. memory: in bytes (None: what is free).
    Raises BitassayError where a step does not fit, with what would."""
    name = empty.config.name_or_path or type(empty).__name__
    rest = ", or fewer recipes"
    way, peak = choose_way(memory_of([empty], recipes, protocol), memory, f"evaluating {name}", rest)
    steps = [(bench, "timing", "--no-bench", bench_bytes(empty, recipes))]
    steps.append((verify, "verifying", "--no-verify", verify_bytes(empty)))
    for wanted, what, without, needed in steps:
        if wanted and memory is not None and needed > memory:
            raise BitassayError(
                f"{what} runs loaded models in 16 bits, which takes {needed / 1e9:.1f} GB of memory, and "
                f"{memory / 1e9:.1f} GB are allowed",
                f"--memory {math.ceil(needed / 1e8) / 10}GB, or {without}",
            )
    return way, peak


def bench_bytes(empty: PreTrainedModel, recipes: Sequence[Recipe]) -> int:
    """Return the peak of timing: the base model and the quantized ones as codes, whose other parameters are
    the base model's."""
    codes = sum(plan.tensor_bytes for plan in plans_of(empty, recipes))
    return base_bytes(empty) + ITEM * parameter_count(empty) + codes


def verify_bytes(empty: PreTrainedModel) -> int:
    """Return the peak of reaching verdicts: the base model, and one that proves with decoded weights."""
    return base_bytes(empty) + 2 * ITEM * parameter_count(empty) + 4 * 1024 * text_config(empty).vocab_size

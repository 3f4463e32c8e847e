"""How fast a model runs: `time_once` for one batch of prompts, `throughput` for models that take turns.

Prefill: tokens of a prompt a second, one forward pass that fills the cache and returns the last logits; its
time is the time to the first token. Decode: tokens a second of greedy decoding, one token of each sequence a
step, with that cache, which is packed where the recipe says so.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.roofline import wait_for
from bitassay.bench.rounds import spread
from bitassay.errors import BitassayError
from bitassay.models.cache import behind, last_logits, stored_bytes, takes_cache
from bitassay.quantization.inputs.kv_cache import empty_cache
from bitassay.record.progress import Progress, silent

DECODE_TOKENS = 12


@dataclass(frozen=True)
class Times:
    """Seconds of a prefill (up to the first token) and of all decode steps after it, and the bytes of the
    cache in the end."""

    first_token_s: float
    decode_s: float
    cache_bytes: int


def throughput(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    prompt: Int[Tensor, " tokens"],
    *,
    decode_tokens: int = DECODE_TOKENS,
    repeats: int = 3,
    progress: Progress = silent,
) -> dict[str, dict[str, float | None]]:
    """Time every model in turn, `repeats` rounds over all of them, and return the columns of each: medians,
    and spreads ((largest - smallest) / median, None of a single time). A model is given as a function that
    returns it, so that the caller decides how many are in memory."""
    times: dict[str, list[Times]] = {name: [] for name in models}
    for round_ in range(repeats):
        for index, (name, model) in enumerate(models.items()):
            if round_ == 0:
                time_once(model(), prompt[None, :8], 2)
            times[name].append(time_once(model(), prompt[None], decode_tokens))
            progress("timing", round_ * len(models) + index + 1, repeats * len(models))
    columns: dict[str, dict[str, float | None]] = {}
    for name, timed in times.items():
        prefill, decode = [item.first_token_s for item in timed], [item.decode_s for item in timed]
        columns[name] = {
            "prefill_tok_s": len(prompt) / statistics.median(prefill),
            "decode_tok_s": decode_tokens / statistics.median(decode),
            "prefill_spread": spread(prefill),
            "decode_spread": spread(decode),
            "prompt_tokens": len(prompt),
            "decode_tokens": decode_tokens,
            "repeats": repeats,
        }
    return columns


@torch.inference_mode()
def time_once(model: PreTrainedModel, prompts: Int[Tensor, "batch tokens"], decode_tokens: int) -> Times:
    """Read all prompts as one batch, then take `decode_tokens` greedy steps."""
    if not takes_cache(model):
        raise BitassayError(
            f"{type(model).__name__} cannot read on from a cache, so it has no decode steps",
            "a model with attention, or one of Mamba",
        )
    cache, begun = empty_cache(model), 0
    tokens, head = prompts.to(model.device), last_logits(model, 1)

    def step() -> Tensor:
        nonlocal begun
        output = model(input_ids=tokens, **behind(model, cache, begun, tokens), **head)
        begun += tokens.shape[1]
        return output.logits[:, -1:].argmax(-1)

    start = _now(model)
    tokens = step()
    filled = _now(model)
    for _ in range(decode_tokens):
        tokens = step()
    return Times(filled - start, _now(model) - filled, stored_bytes(cache))


def _now(model: PreTrainedModel) -> float:
    """The clock once everything asked of the model's device is done."""
    wait_for(model.device)
    return time.perf_counter()

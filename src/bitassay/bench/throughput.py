"""How fast a model runs: `time_once` for one prompt, `throughput` for a few models that take turns.

Prefill: tokens of a prompt a second, one forward pass that fills the cache and returns the last logits; its
time is the time to the first token. Decode: tokens a second of greedy decoding, one token of each sequence a
step, with that cache, which is packed where the recipe says so.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Throughput:
    """Medians over `repeats`; the spread is (largest - smallest) / median, None of a single time."""

    prefill_tok_s: float
    decode_tok_s: float
    prefill_spread: float | None
    decode_spread: float | None
    prompt_tokens: int
    decode_tokens: int
    repeats: int

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def throughput(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    prompt: Int[Tensor, " tokens"],
    *,
    decode_tokens: int = DECODE_TOKENS,
    repeats: int = 3,
    progress: Progress = silent,
) -> dict[str, Throughput]:
    """Time every model in turn, `repeats` rounds over all of them. A model is given as a function that
    returns it, so that the caller decides how many are in memory."""
    times: dict[str, list[Times]] = {name: [] for name in models}
    for round_ in range(repeats):
        for index, (name, model) in enumerate(models.items()):
            if round_ == 0:
                time_once(model(), prompt[None, :8], 2)
            times[name].append(time_once(model(), prompt[None], decode_tokens))
            progress("timing", round_ * len(models) + index + 1, repeats * len(models))
    return {name: _summary(found, len(prompt), decode_tokens) for name, found in times.items()}


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


def _summary(times: list[Times], prompt_tokens: int, decode_tokens: int) -> Throughput:
    prefill, decode = [one.first_token_s for one in times], [one.decode_s for one in times]
    return Throughput(
        prompt_tokens / statistics.median(prefill),
        decode_tokens / statistics.median(decode),
        spread(prefill),
        spread(decode),
        prompt_tokens,
        decode_tokens,
        len(times),
    )

"""How fast models run: prefill and decode, measured alternately so that a busy neighbour slows all of them
alike.

Prefill: tokens of a prompt a second, one forward pass that fills the cache and returns the last logits.
Decode: tokens a second of greedy decoding, one sequence, one token a step, with that cache. Each number is
the median of its repeats after one warm-up.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitassay.record.progress import Progress, silent


@dataclass(frozen=True)
class Throughput:
    """Medians over `repeats`; the spread is (largest - smallest) / median of the times."""

    prefill_tok_s: float
    decode_tok_s: float
    prefill_spread: float
    decode_spread: float
    prompt_tokens: int
    decode_tokens: int
    repeats: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def throughput(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    prompt: Int[Tensor, " tokens"],
    *,
    decode_tokens: int = 12,
    repeats: int = 3,
    progress: Progress = silent,
) -> dict[str, Throughput]:
    """Time every model in turn, `repeats` rounds over all of them. A model is given as a function that
    returns it, so that the caller decides how many are in memory."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_ in range(repeats):
        for index, (name, model) in enumerate(models.items()):
            if round_ == 0:
                _run(model(), prompt[:8], 2)
            times[name].append(_run(model(), prompt, decode_tokens))
            progress("timing", round_ * len(models) + index + 1, repeats * len(models))
    return {name: _summary(pairs, len(prompt), decode_tokens) for name, pairs in times.items()}


@torch.inference_mode()
def _run(model: PreTrainedModel, prompt: Int[Tensor, " tokens"], decode_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of `decode_tokens` decode steps after it."""
    cache = DynamicCache(config=model.config)
    tokens = prompt[None].to(model.device)
    start = _now(model)
    tokens = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    filled = _now(model)
    for _ in range(decode_tokens):
        tokens = (
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        )
    return filled - start, _now(model) - filled


def _now(model: PreTrainedModel) -> float:
    """The clock once everything asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _summary(pairs: list[tuple[float, float]], prompt_tokens: int, decode_tokens: int) -> Throughput:
    prefill, decode = zip(*pairs, strict=True)
    medians = statistics.median(prefill), statistics.median(decode)
    return Throughput(
        prompt_tokens / medians[0],
        decode_tokens / medians[1],
        (max(prefill) - min(prefill)) / medians[0],
        (max(decode) - min(decode)) / medians[1],
        prompt_tokens,
        decode_tokens,
        len(pairs),
    )

"""Times of models and functions that take turns, and their ratios.

`time_once` times one batch of prompts. Prefill: one forward pass that fills the cache and returns the last
logits; its time is the time to the first token. Decode: greedy decoding, one token of each sequence a step,
with that cache, which is packed where the recipe says so.

On a shared machine absolute times mean little. Within one round all take their turn under much the same load,
so ratios within rounds are steadier than times:

    r_i = t_base,i / t_other,i        ratio = exp(mean log r_i)        above 1: faster than the base

The interval is Student's, 95 %, of log r over rounds. It does not cover what would differ on another day.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.roofline import wait_for
from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import NONE, Interval, geometric_interval
from bitassay.models.cache import behind, last_logits, stored_bytes, takes_cache
from bitassay.quantization.inputs.kv_cache import empty_cache
from bitassay.record.progress import Progress, silent

T = TypeVar("T")
DECODE_TOKENS = 12
RATIO = "Student's t, log scale, of the ratios within rounds"
INTERVAL = f"95 %, {RATIO}; {NONE}"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the base; no interval from too few rounds."""

    value: float
    interval: Interval


def ratio_of(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """Return the ratio of paired times in seconds, one of each a round."""
    ratios = [a / b for a, b in zip(base, other, strict=True)]
    return Ratio(statistics.geometric_mean(ratios), geometric_interval(ratios))


def spread(times: Sequence[float]) -> float | None:
    """Return (largest - smallest) / median; None of a single time."""
    return None if len(times) < 2 else (max(times) - min(times)) / statistics.median(times)


def turns(names: Sequence[T], round_: int) -> list[T]:
    """Return the order of a round: each round begins with another one."""
    start = round_ % len(names)
    return [*names[start:], *names[:start]]


def alternate(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = 0.05,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Return the seconds of one call of each function, a time a round. A measurement is as many calls as take
    at least `seconds` in a warm-up, since short timings snap to the scheduler's ticks. wait: returns once
    everything asked of a device is done."""

    def timed(function: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        wait()
        return (clock() - start) / calls

    calls = {}
    for name, function in work.items():
        call_s = timed(function, 1)
        call_s = call_s if call_s > seconds else timed(function, 1)
        calls[name] = max(1, math.ceil(seconds / max(call_s, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds):
        for done, name in enumerate(turns(list(work), round_), round_ * len(work) + 1):
            times[name].append(timed(work[name], calls[name]))
            progress("timing", done, rounds * len(work))
    return times


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

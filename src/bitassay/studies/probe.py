"""A small product and small attentions, as a model has them: numerics that fail on these fail on a model.
It imports torch alone, since it is run in a fresh process for each machine that is tried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

# Queries and keys: a decoding step, a prompt, and one that is long enough for the fused kernel to pack it.
LENGTHS = ((1, 300), (300, 300), (1024, 1024))
HEADS, WIDTH = 2, 64


def compute(device: str, dtype: str, attention: str) -> None:
    """Compute them. Raises RuntimeError as torch does, and where something is not finite. attention: eager or
    sdpa."""
    draw, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, kind)

    results = [random(rows, 4 * WIDTH) @ random(WIDTH, 4 * WIDTH).T for rows in (1, 64)]
    for queries, keys in LENGTHS:
        q, k, v = (random(1, HEADS, length, WIDTH) for length in (queries, keys, keys))
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        if attention == "eager":
            scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(~seen, torch.finfo(kind).min)
            results.append(scores.softmax(-1) @ v)
        else:
            results.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
            results.append(F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1))
    if not all(bool(result.isfinite().all()) for result in results):
        raise RuntimeError("its results are not finite")


def problem(device: str, dtype: str, attention: str) -> str:
    """Return why they cannot be computed, in one line; empty where they can."""
    try:
        compute(device, dtype, attention)
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return ""


def start(setup: Any, folder: Path, progress: Any) -> Callable[[Any], str]:
    """Return the function of a worker's only job. setup: the arguments of `problem`."""
    return lambda content: problem(*setup)

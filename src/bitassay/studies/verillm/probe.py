"""A small product and small attentions, as a model has them: numerics that fail on these fail on a model.

    python -m bitassay.studies.verillm.probe DEVICE DTYPE ATTENTION      exit status 0 where all is well

Imports torch alone, since it is run in a fresh process for each machine that is tried.
"""

import sys

import torch
from torch.nn import functional as F

# Queries and keys: a decoding step, a prompt, and one that is long enough for the fused kernel to pack it.
LENGTHS = ((1, 300), (300, 300), (1024, 1024))
HEADS, WIDTH = 2, 64


def compute(device: str, dtype: str, attention: str) -> None:
    """Raises RuntimeError as torch does, and where something is not finite. attention: eager or sdpa."""
    draw, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, kind)

    found = [random(rows, 4 * WIDTH) @ random(WIDTH, 4 * WIDTH).T for rows in (1, 64)]
    for queries, keys in LENGTHS:
        q, k, v = (random(1, HEADS, length, WIDTH) for length in (queries, keys, keys))
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        if attention == "eager":
            scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(~seen, torch.finfo(kind).min)
            found.append(scores.softmax(-1) @ v)
        else:
            found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
            found.append(F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1))
    if not all(bool(one.isfinite().all()) for one in found):
        raise RuntimeError("its results are not finite")


def problem(device: str, dtype: str, attention: str) -> str:
    """Why it cannot be computed, in one line; empty where it can."""
    try:
        compute(device, dtype, attention)
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(problem(*sys.argv[1:]) or 0)  # a text goes to stderr, with exit status 1

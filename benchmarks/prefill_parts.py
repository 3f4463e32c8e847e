"""Two parts of a prefill that cost more than their products, each beside another way.

    head        the last position asked for by number, of which transformers makes a slice, over by index
                (`models/cache.py`): the whole model, in turns, and whether the logits are the same to the bit
    attention   torch's causal kernel over products of blocks of BLOCK rows, one layer's shapes, at bf16

Above 1 the second way is faster. Medians over ROUNDS. Run: OMP_NUM_THREADS=1 python
benchmarks/prefill_parts.py [--model smollm2-135m] [--rounds 7]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import bitassay
from bitassay.models.cache import last_positions

BLOCK = 128
SHAPES = ((1, 64), (4, 128), (1, 512), (1, 1024))
LENGTHS = (256, 512, 1024)

Heads = Float[Tensor, "heads tokens size"]


def ratio(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """Median seconds of the first over those of the second, in turns, and the first's."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for work, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            work()
            if round_:  # the first is not timed
                kept.append(time.perf_counter() - start)
    one, other = map(statistics.median, times)
    return one / other, one


def by_blocks(q: Heads, k: Heads, v: Heads) -> Heads:
    """Causal attention, BLOCK queries at a time over the keys that they see."""
    hidden = torch.full((BLOCK, BLOCK), float("-inf")).triu(1)
    parts = []
    for start in range(0, q.shape[1], BLOCK):
        end = start + BLOCK
        scores = (q[:, start:end] * q.shape[2] ** -0.5 @ k[:, :end].transpose(1, 2)).float()
        scores[..., start:end] += hidden
        parts.append(scores.softmax(-1).to(v.dtype) @ v[:, :end])
    return torch.cat(parts, 1)


@torch.inference_mode()
def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--rounds", type=int, default=7)
    asked = options.parse_args()
    model = bitassay.load(asked.model, dtype="bfloat16")
    last = last_positions(1, model.device)
    print("| head | number over index | the same logits |\n|---|---:|---|")
    for batch, length in SHAPES:
        ids = torch.randint(model.config.vocab_size, (batch, length))
        one, other = (lambda keep=keep, ids=ids: model(ids, logits_to_keep=keep).logits for keep in (1, last))
        same = torch.equal(one(), other())
        print(f"| {batch} x {length} | {ratio(one, other, asked.rounds)[0]:.2f} | {same} |", flush=True)
    heads, size = (
        model.config.num_attention_heads,
        model.config.hidden_size // model.config.num_attention_heads,
    )
    print("\n| attention | kernel over blocks | kernel, ms a layer | in fp32, ms |\n|---|---:|---:|---:|")
    for length in LENGTHS:
        q, k, v = torch.randn(3, heads, length, size).bfloat16()

        def kernel(dtype: torch.dtype, parts: tuple[Heads, ...] = (q, k, v)) -> Tensor:
            q, k, v = (x[None].to(dtype) for x in parts)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        assert (by_blocks(q, k, v) - kernel(torch.float32)[0]).abs().max() < 0.05
        blocks, seconds = ratio(
            lambda: kernel(torch.bfloat16), lambda q=q, k=k, v=v: by_blocks(q, k, v), asked.rounds
        )
        exact = ratio(lambda: kernel(torch.float32), lambda: kernel(torch.bfloat16), asked.rounds)[1]
        print(f"| {length} tokens | {blocks:.2f} | {seconds * 1e3:.1f} | {exact * 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""When what is learned: the learning rate of each step, and the order of the calibration samples."""

import math

import torch
from jaxtyping import Int
from torch import Tensor


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor of step `step`: linear warm-up, then half a cosine down to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def sample_order(samples: int, picks: int, seed: int) -> Int[Tensor, " picks"]:
    """Which sample is seen when: every one once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(picks / samples)
    return torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])[:picks]

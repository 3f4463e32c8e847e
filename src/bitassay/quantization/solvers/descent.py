"""Gradient descent on shadow weights, as `learned` and `tune` share it.
Adam, a linear warm-up, then half a cosine down to zero; every calibration sample is seen once before any is
seen again."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitassay.quantization.recipe.solvers import Learned, Tune
from bitassay.quantization.solvers.shadow_weight import ShadowWeight

Restore = Callable[[list[nn.Parameter], torch.optim.Optimizer], int]


def descend(
    parameters: Sequence[tuple[Sequence[nn.Parameter], float]],
    shadows: Sequence[ShadowWeight],
    samples: int,
    spec: Learned | Tune,
    backward: Callable[[Int[Tensor, " chosen"]], float],
    restore: Restore | None = None,
    keep: Callable[[int, list[nn.Parameter], torch.optim.Optimizer], None] | None = None,
) -> Iterator[tuple[int, float]]:
    """Learn `parameters`, in kinds with a learning rate each (0: not at all), and yield every step, counted
    from 1, with its loss. `backward(chosen)` leaves the gradients for these samples and returns the loss;
    `restore` puts an earlier state back and returns its steps, `keep` is called after each step."""
    for shadow in shadows:
        shadow.requires_grad_(False)
    groups = [{"params": kind, "lr": rate, "rate": rate} for kind, rate in parameters if rate > 0]
    learned = [parameter for group in groups for parameter in group["params"]]
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    order = sample_order(samples, spec.steps * spec.batch, spec.seed)
    for step in range(0 if restore is None else restore(learned, optimizer), spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, spec.steps, spec.warmup)
        loss = backward(order[step * spec.batch : (step + 1) * spec.batch])
        optimizer.step()
        optimizer.zero_grad()
        for shadow in shadows:
            shadow.clamp()
        if keep is not None:
            keep(step + 1, learned, optimizer)
        yield step + 1, loss


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor of step `step`."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def sample_order(samples: int, picks: int, seed: int) -> Int[Tensor, " picks"]:
    """Return which sample is seen when."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(picks / samples)
    return torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])[:picks]

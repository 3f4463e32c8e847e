"""Gradient descent on shadow weights, as `learned` and `tune` share it.
Adam, a linear warm-up, then half a cosine down to zero; every calibration sample is seen once before any is
seen again.

A parameter moves as soon as its gradient is there, within the backward pass, and the gradient is dropped: no
more than a layer's exist at a time. The moments of Adam may be kept in 16 bits. With `b2 = 0.95` each new
square is a twentieth of its average, far above the 1/256 to which bf16 rounds, so that it is not lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitassay.models.hooks import hooked
from bitassay.quantization.recipe.solvers import Learned, Tune
from bitassay.quantization.solvers.shadow_weight import ShadowWeight
from bitassay.quantization.solvers.shelf import IN_MEMORY, Shelf

BETAS, EPSILON = (0.9, 0.95), 1e-8


class Adam:
    """Adam (1412.6980) whose parameters, in kinds with a learning rate each, move within the backward pass.
    dtype: of the moments, `mean` and `square` of each parameter, on the shelf where the parameter is.
    bounds: what brings a parameter back to where it may be once it moved. step: how many are done; factor:
    what the learning rates are multiplied by."""

    def __init__(
        self,
        kinds: Sequence[tuple[Sequence[nn.Parameter], float]],
        dtype: torch.dtype,
        bounds: Mapping[nn.Parameter, Callable[[], None]] | None = None,
        shelf: Shelf = IN_MEMORY,
    ):
        self.rates = {parameter: rate for kind, rate in kinds for parameter in kind}
        self.bounds, self.shelf = bounds or {}, shelf
        self.mean: dict[nn.Parameter, Tensor] = {}
        self.square: dict[nn.Parameter, Tensor] = {}
        for moments in (self.mean, self.square):
            for parameter in self.rates:
                moments[parameter] = torch.zeros_like(parameter, dtype=dtype)
                if parameter in shelf:
                    shelf.keep([moments[parameter]])
        self.step, self.factor = 0, 1.0

    def moving(self) -> Iterator[RemovableHandle]:
        """Register hooks, for `hooked`, by which each parameter moves when its gradient is there."""
        for parameter in self.rates:
            yield parameter.register_post_accumulate_grad_hook(self.move)

    @torch.no_grad()
    def move(self, parameter: nn.Parameter) -> None:
        """Take a parameter's step of those after `step`, and drop its gradient."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        with self.shelf.lent(self.mean[parameter], self.square[parameter]):
            self._move(parameter, gradient)
        if (bound := self.bounds.get(parameter)) is not None:
            bound()
        self.shelf.changed(parameter)

    def _move(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        mean = self.mean[parameter].float().lerp_(gradient, 1 - BETAS[0])
        square = (
            self.square[parameter].float().mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        )
        del gradient
        self.mean[parameter].copy_(mean)
        self.square[parameter].copy_(square)
        mean_share, square_share = (1 - beta ** (self.step + 1) for beta in BETAS)
        size = self.rates[parameter] * self.factor / mean_share
        parameter.addcdiv_(mean, square.div(square_share).sqrt_().add_(EPSILON), value=-size)


Restore = Callable[[list[nn.Parameter], Adam], int]


def descend(
    parameters: Sequence[tuple[Sequence[nn.Parameter], float]],
    shadows: Sequence[ShadowWeight],
    samples: int,
    spec: Learned | Tune,
    backward: Callable[[Int[Tensor, " chosen"]], float],
    restore: Restore | None = None,
    keep: Callable[[int, list[nn.Parameter], Adam], None] | None = None,
    moments: torch.dtype = torch.float32,
    shelf: Shelf = IN_MEMORY,
) -> Iterator[tuple[int, float]]:
    """Learn `parameters`, in kinds with a learning rate each (0: not at all), and yield every step, counted
    from 1, with its loss. `backward(chosen)` runs the backward pass for these samples and returns the
    loss; `restore` puts an earlier state back and returns its steps, `keep` is called after each step.
    moments: their dtype. shelf: where parameters may be."""
    for shadow in shadows:
        shadow.requires_grad_(False)
    kinds = [(kind, rate) for kind, rate in parameters if rate > 0]
    learned = [parameter for kind, _ in kinds for parameter in kind]
    for parameter in learned:
        parameter.requires_grad_(True)
    adam = Adam(kinds, moments, {shadow.u: shadow.clamp for shadow in shadows}, shelf)
    order = sample_order(samples, spec.steps * spec.batch, spec.seed)
    adam.step = 0 if restore is None else restore(learned, adam)
    with hooked(adam.moving()):
        while adam.step < spec.steps:
            adam.factor = learning_rate(adam.step, spec.steps, spec.warmup)
            loss = backward(order[adam.step * spec.batch : (adam.step + 1) * spec.batch])
            adam.step += 1
            if keep is not None:
                keep(adam.step, learned, adam)
            yield adam.step, loss


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

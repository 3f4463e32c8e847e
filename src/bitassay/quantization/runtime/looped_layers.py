"""Looped layers: a decoder layer that runs several times, as the layer's forward. A block of layers that
follow each other may run again as one: then the first layer's forward is that of the block, and the others
pass on what they get.

With f_i(x) = layer_i(x) - x, what the i-th copy adds to a state (of a block, all of its layers in turn), and
the residual coefficients a (keep) and c (add),

    serial     x_i = a_i x_(i-1) + c_i f_i(x_(i-1))         one pass after the other
    parallel   x'  = a x + sum_i c_i f_i(x)                 every copy reads the same state

A step with a = c = 1 is the layer's own output, to the bit. Others are computed in fp32.

Each pass has keys and values of its own, so that a pass over a token attends to what the *same* pass made of
the tokens before it. In the cache pass 0 has the slot of the layer, the others slots behind those of all
layers (`Slot`).

Dynamic passes stop for each token alone, once a pass changes its state by less than `Stop` says, or once the
token has used up its budget over all layers. A token that has stopped keeps its state; the passes that others
still need leave its keys and values in their slots. Once every token has stopped, only that is done. So the
result does not depend on how a text is split into forwards; the cost does. `Usage` counts the passes that
each token asked for.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from bitassay.quantization.recipe.replication import Steps, Stop

State = Float[Tensor, "batch tokens hidden"]
Pass = Callable[[State], State]


def step(x: State, y: State, keep: float, add: float) -> State:
    """Return `keep x + add f`, with f = y - x."""
    if keep == add == 1:
        return y
    return (keep * x.float() + add * (y.float() - x.float())).to(x.dtype)


def serial(x: State, passes: Sequence[Pass], steps: Steps) -> State:
    """Run pass after pass."""
    for run, keep, add in zip(passes, steps.keep, steps.add, strict=True):
        x = step(x, run(x), keep, add)
    return x


def parallel(x: State, passes: Sequence[Pass], steps: Steps) -> State:
    """Run all passes from the same state."""
    if steps.count == 1:
        return serial(x, passes, steps)
    total = steps.keep[0] * x.float()
    for run, add in zip(passes, steps.add, strict=True):
        total += add * (run(x).float() - x.float())
    return total.to(x.dtype)


def dynamic(
    x: State,
    passes: Sequence[Pass],
    steps: Steps,
    stop: Stop,
    usage: "Usage",
    rest: Callable[[State, int], None],
) -> State:
    """Run pass after pass, for each token as long as its state still changes and its budget lasts;
    `rest(x, number)` leaves in the cache what the passes from that number on would have left."""
    going = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for number, (run, keep, add) in enumerate(zip(passes, steps.keep, steps.add, strict=True)):
        if number:
            if stop.budget is not None:
                going = going & (usage.spent < stop.budget)
            if not going.any():
                rest(x, number)
                break
            usage.spent = usage.spent + going
        after = torch.where(going[..., None], step(x, run(x), keep, add), x)
        going, x = going & changed(x, after, stop), after
    return x


def changed(before: State, after: State, stop: Stop) -> Bool[Tensor, "batch tokens"]:
    """Return which tokens' states changed by more than `stop` allows."""
    before, after = before.float(), after.float()
    angle = 1 - torch.cosine_similarity(before, after, dim=-1)
    moved = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (angle > stop.cosine) | (moved > stop.norm)


@dataclass
class Usage:
    """What dynamic passes cost. spent: passes beyond the first of each token of the forward under way, over
    the layers so far. The totals are of all forwards that have ended since `clear`."""

    spent: Int[Tensor, "batch tokens"] = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.long))
    passes: int = 0
    tokens: int = 0

    def begin(self, x: State) -> None:
        """Begin a new forward."""
        self.spent = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)

    def end(self) -> None:
        """Add the forward that ends to the totals."""
        self.passes += int(self.spent.sum())
        self.tokens += self.spent.numel()

    def clear(self) -> None:
        """Count from 0."""
        self.passes = self.tokens = 0

    @property
    def passes_per_token(self) -> float:
        """Return the passes beyond one a layer, on average."""
        return self.passes / max(1, self.tokens)


class _Kept(Exception):
    """Ends a pass once its keys and values are in the cache."""


class Slot:
    """Stands for a cache in one pass: keys and values go into `slot`. only_keep: then the pass ends."""

    def __init__(self, cache: Cache, slot: int, only_keep: bool = False):
        self._cache, self._slot, self._only_keep = cache, slot, only_keep

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layers = self._cache.layers
        if self._slot >= len(layers) and self._cache.layer_class_to_replicate is None:
            like, names = layers[layer_idx], ("sliding_window", "max_cache_len")
            layers.append(type(like)(**{name: getattr(like, name) for name in names if hasattr(like, name)}))
            assert self._slot < len(layers), "slots are filled in their order"
        kept = self._cache.update(keys, values, self._slot, *args, **kwargs)
        if self._only_keep:
            raise _Kept
        return kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def passed_on(hidden_states: State, *_args: Any, **_options: Any) -> State:
    """Be the forward of a layer whose block has run already."""
    return hidden_states


class LoopedForward:
    """The forward of a looped decoder layer: it takes the place of `layer.forward`, and the layer keeps all
    its names. runs: the forwards of the layers that each pass goes through, one or those of a block; the same
    ones may come again. first_slot: of the second pass. usage: where passes are dynamic; begins, ends: with
    this layer, a forward does."""

    def __init__(
        self,
        runs: Sequence[Sequence[Callable[..., Any]]],
        steps: Steps,
        *,
        first_slot: int,
        how: str = "serial",
        stop: Stop | None = None,
        usage: Usage | None = None,
    ):
        assert len(runs) == steps.count
        # Layers' own forwards: hooks of the layer belong to all passes together.
        self.forwards = runs
        self.steps, self.how, self.first_slot = steps, how, first_slot
        self.stop, self.usage = stop, usage
        self.begins = self.ends = False

    def __call__(self, hidden_states: State, *args: Any, **options: Any) -> Any:
        count = self.steps.count
        passes = [lambda x, number=number: self._run(number, x, args, options) for number in range(count)]
        if self.how == "parallel":
            return parallel(hidden_states, passes, self.steps)
        if self.stop is None or self.usage is None:
            return serial(hidden_states, passes, self.steps)

        def rest(x: State, first: int) -> None:
            if options.get("past_key_values") is not None:
                for number in range(first, count):
                    with suppress(_Kept):
                        self._run(number, x, args, options, only_keep=True)

        if self.begins:
            self.usage.begin(hidden_states)
        x = dynamic(hidden_states, passes, self.steps, self.stop, self.usage, rest)
        if self.ends:
            self.usage.end()
        return x

    def _run(
        self, number: int, x: State, args: tuple, options: dict[str, Any], only_keep: bool = False
    ) -> State:
        cache, run = options.get("past_key_values"), self.forwards[number]
        for index, forward in enumerate(run):
            if number and cache is not None:
                slot = Slot(cache, self.first_slot + (number - 1) * len(run) + index, only_keep)
                options = options | {"past_key_values": slot}
            output = forward(x, *args, **options)
            x = output[0] if isinstance(output, tuple) else output
        return x

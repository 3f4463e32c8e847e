"""Run some segments of the decoder layers alone, in a replay.

A replay puts claimed states behind some layers (`taps.replay_states`). What the layers before such a place
have made is then read by nobody, so a segment whose end is not asked for need not run: its layers hand on
what they are given, and the next segment reads the claimed states all the same.

That is so where states are all that layers hand on. Others share keys and values with layers behind them,
keep several streams, or return more than states. Names do not tell, so it is tried once for each choice of
segments: a short text is replayed with and without the layers that are to be passed by, and what is asked
for must be the same to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.engines.taps import record_states, replay_states
from bitassay.models.hooks import forwarded, hooked
from bitassay.models.walk import decoder_layers

TRIED = 6  # tokens of the text that is tried
_trials: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], bool]]" = WeakKeyDictionary()


class PassedBy:
    """The forward of a layer that is passed by: it returns the states that it is given."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return arguments[0] if arguments else options["hidden_states"]


@contextmanager
def passing_by(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Let these decoder layers, counted from 1, hand on what they are given within the context."""
    modules = decoder_layers(model)
    with forwarded((modules[layer - 1], PassedBy()) for layer in layers):
        yield


def needless(model: PreTrainedModel, layers: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return the decoder layers that need not run in a replay of which only the segments that end at `ends`
    are wanted; none where the model cannot do without. layers: those behind which states are claimed,
    ascending; a segment is what lies between two of them, or before the first."""
    passed: list[int] = []
    for before, end in zip([0, *layers], layers, strict=False):
        if end not in ends:
            passed += range(before + 1, end + 1)
    if not passed:
        return ()
    known, choice = _trials.setdefault(model, {}), tuple(passed)
    if choice not in known:
        known[choice] = _can_pass(model, layers, ends, choice)
    return choice if known[choice] else ()


@torch.no_grad()
def _can_pass(
    model: PreTrainedModel, layers: Sequence[int], ends: Sequence[int], passed: Sequence[int]
) -> bool:
    modules = decoder_layers(model)
    shares = len(set(modules)) < len(modules)
    if shares or any(parameter.is_meta for parameter in model.parameters()):
        return False  # on disk a trial takes as long as what it could save
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = (7 * torch.arange(TRIED) + 3)[None].to(model.device) % size
    generator = torch.Generator().manual_seed(0)
    where = torch.ones(1, TRIED, dtype=torch.bool, device=model.device)
    plain = True

    def see(_module: nn.Module, _arguments: object, output: Any) -> None:
        nonlocal plain
        plain = plain and isinstance(output, Tensor) and output.ndim == 3

    hooks = (modules[layer - 1].register_forward_hook(see) for layer in passed)
    with hooked(hooks), record_states(model, layers) as own:
        model(input_ids=tokens, use_cache=False)
    if not plain:
        return False
    claimed: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, (states,) in own.items():
        claimed[layer] = torch.randn(states.shape, generator=generator).to(states), where

    def read(without: Sequence[int], shift: int = 0) -> list[Tensor]:
        with (
            passing_by(model, without),
            record_states(model, ends) as recorded,
            replay_states(model, claimed),
        ):
            logits = model(input_ids=tokens.roll(shift, 1), use_cache=False).logits
        return [logits, *(pieces[0] for pieces in recorded.values())]

    wanted = read(())
    read((), shift=1)  # so that what a layer may have kept is of another text
    try:
        found = read(passed)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return False  # layers behind miss what these hand on, in any of these ways
    return all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))

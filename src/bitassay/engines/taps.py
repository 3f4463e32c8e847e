"""Taps: hidden states read off while a model runs.

A tap on decoder layer l (counted from 1) records what that layer returns. For the last layer this is the
layer's own output, *before* the final norm, so that all taps are alike (transformers' `output_hidden_states`
gives the last one after the norm). The embedding output is never tapped: it depends on the token ids alone,
so it would match whatever ran. Of a model with several residual streams the first is recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.walk import decoder_layers

EVERY = 8


def tap_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the layers that are sampled: every 8th, counted from 1, and always the last."""
    count = len(decoder_layers(model))
    return tuple(sorted({*range(EVERY, count + 1, EVERY), count}))


@contextmanager
def record_states(
    model: PreTrainedModel, layers: Sequence[int]
) -> Iterator[dict[int, list[Float[Tensor, "batch tokens hidden"]]]]:
    """Record within the context: each forward appends every tapped layer's output to the list of that layer,
    on the model's device. Raises BitassayError for a layer that the model does not have."""
    modules = decoder_layers(model)
    if unknown := [layer for layer in layers if not 1 <= layer <= len(modules)]:
        raise BitassayError(
            f"there is no decoder layer {unknown[0]}", f"layers are counted from 1 to {len(modules)}"
        )
    recorded: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    shape = torch.Size()  # batch and tokens of the forward under way

    def embedded(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal shape
        shape = arguments[0].shape

    def tap(layer: int):
        def hook(_module: nn.Module, _arguments: object, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            if states.ndim == 4:  # residual streams: behind the tokens, of Gemma 3n in front
                states = states[:, :, 0] if states.shape[:2] == shape else states[0]
            recorded[layer].append(states.detach().clone())  # a model may change its own tensor in place

        return hook

    entering = [model.get_input_embeddings().register_forward_pre_hook(embedded)]
    with hooked(entering), hooked(modules[i - 1].register_forward_hook(tap(i)) for i in layers):
        yield recorded


def joined_states(recorded: dict[int, list[Tensor]]) -> dict[int, Float[Tensor, "batch tokens hidden"]]:
    """Join what the forwards recorded along the tokens, on the CPU."""
    return {layer: torch.cat(pieces, dim=1).cpu() for layer, pieces in recorded.items()}

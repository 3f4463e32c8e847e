"""Taps: hidden states read off while a model runs.

A tap on decoder layer l (counted from 1) records what that layer returns. For the last layer this is the
layer's own output, *before* the final norm, so that all taps are alike (transformers' `output_hidden_states`
gives the last one after the norm). The embedding output is never tapped: it depends on the token ids alone,
so it would match whatever ran. Of a model with several residual streams the first is recorded.

`replay_states` goes the other way: layers behind a tap read states that somebody else claims.
"""

from collections.abc import Iterator, Mapping, Sequence
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


def check_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raise BitassayError for a layer that the model does not have."""
    count = len(decoder_layers(model))
    if unknown := [layer for layer in layers if not 1 <= layer <= count]:
        raise BitassayError(
            f"there is no decoder layer {unknown[0]}", f"layers are counted from 1 to {count}"
        )


@contextmanager
def record_states(
    model: PreTrainedModel, layers: Sequence[int]
) -> Iterator[dict[int, list[Float[Tensor, "batch tokens hidden"]]]]:
    """Record within the context: each forward appends every tapped layer's output to the list of that layer,
    on the model's device. Raises BitassayError for a layer that the model does not have."""
    check_layers(model, layers)
    modules = decoder_layers(model)
    recorded: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    shape = torch.Size()  # batch and tokens of the forward under way

    def embedded(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal shape
        shape = arguments[0].shape

    def tap(layer: int):
        def hook(_module: nn.Module, _arguments: object, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            states = _first_stream(states, shape)
            recorded[layer].append(states.detach().clone())  # a model may change its own tensor in place

        return hook

    entering = [model.get_input_embeddings().register_forward_pre_hook(embedded)]
    with hooked(entering), hooked(modules[i - 1].register_forward_hook(tap(i)) for i in layers):
        yield recorded


@contextmanager
def replay_states(
    model: PreTrainedModel, claimed: Mapping[int, tuple[Float[Tensor, "batch tokens hidden"], Tensor]]
) -> Iterator[None]:
    """Let what is behind each layer of `claimed`, further layers or the output head, read these states
    instead of the layer's own output, where the mask [batch, tokens] beside them says so. A layer that puts
    out anything but a state for each token is left as it is."""
    modules = decoder_layers(model)

    def replace(states: Tensor, where: Tensor):
        def hook(_module: nn.Module, _arguments: object, output: Any) -> Any:
            replaced = (output if isinstance(output, Tensor) else output[0]).clone()
            stream = _first_stream(replaced, where.shape)
            if stream.shape[:2] != where.shape:
                return output
            stream[where] = states[where].to(stream)
            if isinstance(output, Tensor):
                return replaced
            make = type(output) if hasattr(output, "_fields") else lambda *parts: parts
            return make(replaced, *output[1:])

        return hook

    with hooked(modules[layer - 1].register_forward_hook(replace(*of)) for layer, of in claimed.items()):
        yield


def _first_stream(states: Tensor, shape: tuple[int, ...]) -> Float[Tensor, "batch tokens hidden"]:
    """Return the residual stream that is sampled, as a view. shape: batch and tokens."""
    if states.ndim < 4:
        return states
    return states[:, :, 0] if states.shape[:2] == shape else states[0]  # of Gemma 3n streams come first


def joined_states(recorded: dict[int, list[Tensor]]) -> dict[int, Float[Tensor, "batch tokens hidden"]]:
    """Join what the forwards recorded along the tokens, on the CPU."""
    return {layer: torch.cat(pieces, dim=1).cpu() for layer, pieces in recorded.items()}

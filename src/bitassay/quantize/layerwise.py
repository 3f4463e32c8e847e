"""Calibrated quantization, one decoder layer at a time.

The calibration text runs through the layers in order. Each layer is quantized for the inputs that it will
really get, those that the quantized layers before it put out; a second stream of the unquantized layers'
outputs is kept where a method wants to know what the layer should have said. Peak memory is the model, these
streams and the statistics of one layer. With a work folder every finished layer is a file there, and the same
call goes on after the last one.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.models.walk import decoder, decoder_layers

BATCH_SAMPLES = 8
CHUNK_ROWS = 8192
BLOCK_COLUMNS = 256
LEARNED_STREAMS = 4  # what learning a layer holds beside its input, as wide as it: measured on SmolLM2

Hidden = Float[Tensor, "samples tokens hidden"]


def memory_of(text_tokens: int, hidden: int, widest: int, streams: int) -> int:
    """Bytes of what one layer makes of a calibration text in fp32, roughly: at a gated MLP its two branches
    and their product, `widest` features each; the layer's input, the residual and the normed input; and
    `streams` more as wide as the hidden state."""
    return 4 * text_tokens * (3 * widest + (3 + streams) * hidden)


class Stream(NamedTuple):
    """What enters a layer: hidden states, and each layer's other arguments (masks, rotary embeddings)."""

    hidden: Hidden
    arguments: list[dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass once the first layer's input is known."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, tokens: Int[Tensor, "samples tokens"]) -> Stream:
    """What the first decoder layer gets for these tokens, and the other arguments of every layer."""
    layers, arguments, hidden = decoder_layers(model), [], []

    def keep_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append(kwargs | {"past_key_values": None, "use_cache": False})

    def keep_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        raise _Stop

    handles = [layer.register_forward_pre_hook(keep_arguments, with_kwargs=True) for layer in layers]
    decoder(model)(input_ids=tokens[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    handle = layers[0].register_forward_pre_hook(keep_hidden, with_kwargs=True)
    for batch in tokens.split(BATCH_SAMPLES):
        try:
            decoder(model)(input_ids=batch, use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return Stream(torch.cat(hidden), arguments)


def call_layer(layer: nn.Module, hidden: Hidden, arguments: dict[str, Any]) -> Hidden:
    """One layer on one batch. The arguments were taken from a single sample and broadcast."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Hidden, arguments: dict[str, Any]) -> Hidden:
    """One layer on all samples."""
    return torch.cat([call_layer(layer, batch, arguments) for batch in hidden.split(BATCH_SAMPLES)])


@torch.no_grad()
def input_groups(
    layer: nn.Module, sample: Hidden, arguments: dict[str, Any], linears: Mapping[str, nn.Linear]
) -> list[tuple[str, ...]]:
    """The linears of a layer, those that read the same tensor together, in the order of their calls."""
    groups: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # held, so that no other tensor takes over an identity

    def reads(name: str):
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            groups.setdefault(id(args[0]), []).append(name)

        return note

    with _pre_hooks({module: reads(name) for name, module in linears.items()}):
        call_layer(layer, sample, arguments)
    return [tuple(names) for names in groups.values()]


def products_in(precision: str | None, device: torch.device) -> torch.autocast:
    """Products of matrices are computed in that dtype here; None: in their own."""
    dtype = None if precision is None else getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=precision is not None)


def hessian_of(inputs: Float[Tensor, "... in"]) -> Float[Tensor, "in in"]:
    """`sum x x^T`: fp32 products of chunks, summed in fp64; of a symmetric matrix, the upper blocks alone."""
    columns = inputs.shape[-1]
    starts = range(0, columns, BLOCK_COLUMNS)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    with products_in(None, inputs.device):
        for x in inputs.reshape(-1, columns).split(CHUNK_ROWS):
            x = x.float()
            for start in starts:
                total[start : start + BLOCK_COLUMNS, start:] += (
                    x[:, start : start + BLOCK_COLUMNS].T @ x[:, start:]
                )
    return total.triu() + total.triu(1).T


@torch.no_grad()
def quantize_in_passing(
    layer: nn.Module,
    hidden: Hidden,
    arguments: dict[str, Any],
    linears: Mapping[str, nn.Linear],
    groups: list[tuple[str, ...]],
    solve: Callable[[tuple[str, ...], Float[Tensor, "in in"]], None],
) -> Hidden:
    """Run a layer once over all samples, and quantize each of the `input_groups` when its input arrives:
    `solve` replaces their weights, and what follows sees it. Returns the quantized layer's output."""

    def arrive(names: tuple[str, ...]):
        def quantize(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            solve(names, hessian_of(args[0]))

        return quantize

    with _pre_hooks({linears[names[0]]: arrive(names) for names in groups}):
        return call_layer(layer, hidden, arguments)


@contextmanager
def _pre_hooks(hooks: Mapping[nn.Module, Any]):
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

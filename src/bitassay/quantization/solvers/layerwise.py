"""Calibrated quantization, one decoder layer at a time: what enters each layer.

Each layer is quantized for the inputs that it will really get, those that the quantized layers before it put
out; a second stream of the unquantized layers' outputs is kept where a method needs it. Peak memory is the
model (one layer, where it was opened), these streams, what one batch makes of the layer, and the statistics
of one input.
"""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked, reading
from bitassay.models.precision import fast_in_bf16, widest
from bitassay.models.walk import decoder_layers, decoder_of
from bitassay.quantization.shapes import Hessian, Tokens

BATCH_SAMPLES = 8
CHUNK_ROWS = 8192
EXACT_BYTES = 2**28
BLOCK_COLUMNS = 256
LEARNED_STREAMS = 4  # what learning a layer holds beside its input, as wide as it: measured on SmolLM2

Hidden = Float[Tensor, "samples *hidden"]
Samples = slice | Int[Tensor, " chosen"]


def memory_of(text_tokens: int, hidden: int, widest: int, streams: int) -> int:
    """Return the bytes of what one layer makes of a calibration text in fp32, roughly: at a gated MLP its two
    branches and their product, `widest` features each; the layer's input, the residual and the normed input;
    and `streams` more as wide as the hidden state."""
    return 4 * text_tokens * (3 * widest + (3 + streams) * hidden)


@dataclass(frozen=True)
class Arguments:
    """What a layer gets besides hidden states, for every sample. hidden_name: None where these come first.
    axis: of samples in hidden states as the layer takes them. handed: keys and values that layers of this
    stream have handed on to layers behind them."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None
    axis: int
    samples: int
    handed: dict[str, list[Tensor]]

    def call(self, layer: Callable[..., Any], hidden: Hidden, which: Samples = slice(None)) -> Hidden:
        """Run the layer on these samples (numbers on the host), of which `hidden` are the states."""
        indices = torch.arange(self.samples)[which].to(hidden.device)
        mappings: list[MutableMapping[str, Any]] = []

        def ready(leaf: Any) -> Any:
            if isinstance(leaf, _Handed):
                so_far = {key: tuple(part[indices] for part in parts) for key, parts in self.handed.items()}
                mappings.append(leaf.kind(so_far))
                return mappings[-1]
            return leaf.of(indices) if isinstance(leaf, _Rows) else leaf

        positional, named = _mapped(self.positional, ready), _mapped(self.named, ready)
        entering = hidden.movedim(0, self.axis)
        if self.hidden_name is None:
            positional = (entering, *positional)
        else:
            named[self.hidden_name] = entering
        output = hidden_of(layer(*positional, **named), entering)
        for key, value in (item for mapping in mappings for item in mapping.items()):
            if key not in self.handed:
                self.handed[key] = [part.new_zeros(self.samples, *part.shape[1:]) for part in value]
            for kept, part in zip(self.handed[key], value, strict=True):
                kept[indices] = part.detach().to(kept.dtype)
        return output.movedim(self.axis, 0)

    @property
    def differ(self) -> bool:
        """Whether samples have some of their own."""
        leaves: list[Any] = []
        _mapped((self.positional, self.named), leaves.append)
        return any(isinstance(leaf, _Rows) and len(leaf.rows) > 1 for leaf in leaves)


class Stream(NamedTuple):
    """What enters a layer: hidden states, samples first, and each layer's other arguments."""

    hidden: Hidden
    arguments: list[Arguments]

    def second(self) -> "Stream":
        """Return a stream that begins alike, and whose layers hand on what is their own."""
        handed: dict[str, list[Tensor]] = {}
        return Stream(self.hidden, [replace(layer, handed=handed) for layer in self.arguments])


class _Rows(NamedTuple):
    """A tensor with the samples along `axis`, each with one or more indices there (a bias for each head); in
    `rows`, `[samples, indices, ...]`, they are in front, or one that is common to all."""

    rows: Tensor
    axis: int

    def of(self, indices: Tensor) -> Tensor:
        common = len(self.rows) == 1
        rows = self.rows.expand(len(indices), *self.rows.shape[1:]) if common else self.rows[indices]
        return rows.flatten(0, 1).movedim(0, self.axis)


class _Handed(NamedTuple):
    """Stands for a mapping of that kind, into which layers put what layers behind them read."""

    kind: Callable[[dict[str, Any]], MutableMapping[str, Any]]


class _Call(NamedTuple):
    layer: nn.Module
    positional: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None


class _Stop(Exception):
    """Ends a forward pass once the first layer's input is known."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, tokens: Tokens) -> Stream:
    """Return what the first decoder layer gets for these tokens, and the other arguments of every layer. What
    differs from sample to sample is found by a forward over two without a token in common. Raises
    BitassayError for a model whose layers, called one after the other with these arguments, do not give what
    the model gives."""
    layers = decoder_layers(model)
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    pair = torch.cat([tokens[:1], (tokens[:1] + 1) % size]).to(model.device)
    single, double = _Forward(model, pair[:1]), _Forward(model, pair)
    axis = _axis(single.hidden, double.hidden)
    if axis is None or [call.layer for call in double.calls] != list(layers):
        raise _not_one_by_one(model)
    trial = _stream(single, double, [double], axis, 2)
    hidden, wanted = trial.hidden, double.last.movedim(axis, 0).float()
    for layer, arguments in zip(layers, trial.arguments, strict=True):
        hidden = arguments.call(layer, hidden)
    if (hidden.float() - wanted).norm() > 1e-2 * wanted.norm():
        raise _not_one_by_one(model)
    parts = tokens.to(model.device).split(BATCH_SAMPLES)
    if any(layer.differ for layer in trial.arguments):  # each layer's own are known once the model runs
        return _stream(single, double, [_Forward(model, part) for part in parts], axis, len(tokens))
    entering = torch.cat([_Forward(model, part, stop=True).hidden.movedim(axis, 0) for part in parts])
    return Stream(entering, [replace(layer, samples=len(tokens)) for layer in trial.second().arguments])


class _Forward:
    """The calls of the decoder layers in a forward over these tokens, what entered the first one, and what
    the last one put out. written: the mappings into which layers put something. stop: in front of the first
    layer."""

    def __init__(self, model: PreTrainedModel, tokens: Tokens, stop: bool = False):
        self.calls: list[_Call] = []
        self.hidden = self.last = torch.empty(0)
        seen: dict[int, tuple[Any, int]] = {}

        def before(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            name = None if positional else "hidden_states"
            rest = {key: value for key, value in named.items() if key != name}
            if not self.calls:
                self.hidden = positional[0] if name is None else named[name]
            self.calls.append(_Call(layer, positional[1:], rest, name))
            for value in (*positional[1:], *rest.values()):
                if isinstance(value, MutableMapping):
                    seen.setdefault(id(value), (value, len(value)))
            if stop:
                raise _Stop

        def after(_layer: nn.Module, _positional: Any, output: Any) -> None:
            self.last = hidden_of(output, self.hidden)

        layers = decoder_layers(model)
        with (
            hooked(layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers),
            hooked(layer.register_forward_hook(after) for layer in layers),
            suppress(_Stop),
        ):
            decoder_of(model)(input_ids=tokens, use_cache=False)
        self.written = {key for key, (value, length) in seen.items() if len(value) != length}


def _stream(single: _Forward, double: _Forward, batches: list[_Forward], axis: int, samples: int) -> Stream:
    handed: dict[str, list[Tensor]] = {}
    arguments = []
    for index, (single_call, double_call) in enumerate(zip(single.calls, double.calls, strict=True)):
        calls = [batch.calls[index] for batch in batches]
        parts = [call.positional for call in calls], [call.named for call in calls]
        positional = _merged(single_call.positional, double_call.positional, parts[0], double.written)
        named = _merged(single_call.named, double_call.named, parts[1], double.written)
        arguments.append(Arguments(positional, named, double_call.hidden_name, axis, samples, handed))
    return Stream(torch.cat([batch.hidden.movedim(axis, 0) for batch in batches]), arguments)


def _merged(single: Any, double: Any, batches: list[Any], written: set[int]) -> Any:
    """Return arguments of all samples, from those of one sample, of two, and of all in batches."""
    if isinstance(double, Tensor):
        axis = _axis(single, double)
        if axis is None:
            return double
        first, second = (part[None] for part in double.movedim(axis, 0).split(single.shape[axis]))
        if torch.equal(first, second):
            return _Rows(first, axis)
        rows = [batch.movedim(axis, 0).unflatten(0, (-1, single.shape[axis])) for batch in batches]
        return _Rows(torch.cat(rows), axis)
    if isinstance(double, Cache):
        return None  # nothing was cached
    if id(double) in written:
        return _Handed(type(double))
    if isinstance(double, Mapping):
        return {
            key: _merged(single[key], double[key], [batch[key] for batch in batches], written)
            for key in double
        }
    if isinstance(double, tuple | list):
        parts = zip(single, double, *batches, strict=True)
        return tuple(_merged(first, second, rest, written) for first, second, *rest in parts)
    return double


def _axis(single: Any, double: Tensor) -> int | None:
    """Return the axis along which one sample and two differ in size."""
    sizes = enumerate(zip(single.shape, double.shape, strict=True))
    return next((axis for axis, (few, many) in sizes if few != many), None)


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same tree with other leaves."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if type(tree) is tuple:
        return tuple(_mapped(value, change) for value in tree)
    return change(tree)


def _not_one_by_one(model: PreTrainedModel) -> BitassayError:
    return BitassayError(
        f"{type(model).__name__}: its decoder layers hand on more than hidden states, so that they cannot be "
        "calibrated one after the other",
        "a recipe without calibration, such as w4",
    )


def hidden_of(output: Any, entering: Tensor) -> Tensor:
    """Return the hidden states in what a layer returns: the first tensor of their shape."""
    parts = (output,) if isinstance(output, Tensor) else output
    return next(part for part in parts if isinstance(part, Tensor) and part.shape == entering.shape)


@torch.no_grad()
def run_layer(layer: Callable[..., Any], hidden: Hidden, arguments: Arguments) -> Hidden:
    """Run one layer on all samples."""
    output = torch.empty_like(hidden)
    for start in range(0, len(hidden), BATCH_SAMPLES):
        batch = slice(start, start + BATCH_SAMPLES)
        output[batch] = arguments.call(layer, hidden[batch], batch)
    return output


@torch.no_grad()
def input_groups(
    layer: nn.Module, hidden: Hidden, arguments: Arguments, linears: Mapping[str, nn.Linear]
) -> list[tuple[str, ...]]:
    """Return the linears of a layer in the order of their calls, those that read the same tensor together."""
    groups: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # held, so that no other tensor takes over an identity

    def note(name: str, x: Tensor) -> None:
        inputs.append(x)
        groups.setdefault(id(x), []).append(name)

    with hooked(reading(linears, note)):
        arguments.call(layer, hidden[:1], slice(0, 1))
    return [tuple(names) for names in groups.values()]


def products_in(precision: str | None, device: torch.device) -> torch.autocast:
    """Compute products of matrices in that dtype within the context, where it is fast; None, and elsewhere:
    in their own."""
    dtype = None if precision is None else getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=precision is not None and fast_in_bf16(device))


def hessian_of(inputs: Float[Tensor, "... in"]) -> Hessian:
    """Return `sum x x^T`."""
    return mirrored(add_products(None, inputs))


def add_products(total: Hessian | None, inputs: Float[Tensor, "... in"]) -> Hessian:
    """Add `sum x x^T` to the upper blocks of `total`, in place, and return it; None: nothing yet. Products of
    chunks are in fp32, sums in fp64 where these take no more than EXACT_BYTES, else in fp32."""
    columns = inputs.shape[-1]
    if total is None:
        dtype = min(sums_dtype(columns), widest(inputs.device), key=lambda dtype: dtype.itemsize)
        total = torch.zeros(columns, columns, dtype=dtype, device=inputs.device)
    with products_in(None, inputs.device):
        for chunk in inputs.reshape(-1, columns).split(CHUNK_ROWS):
            x = chunk.float()
            for start in range(0, columns, BLOCK_COLUMNS):
                block = slice(start, start + BLOCK_COLUMNS)
                total[block, start:] += x[:, block].T @ x[:, start:]
    return total


def sums_dtype(columns: int) -> torch.dtype:
    """Return the dtype in which a Hessian of so many columns is summed, and first factorised."""
    return torch.float64 if 8 * columns**2 <= EXACT_BYTES else torch.float32


def mirrored(total: Hessian) -> Hessian:
    """Copy the upper blocks to the lower ones, in place; returns the same tensor."""
    for start in range(0, len(total), BLOCK_COLUMNS):
        stop = start + BLOCK_COLUMNS
        within = total[start:stop, start:stop]
        within.copy_(within.triu() + within.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


class _Reached(Exception):
    """Ends a forward of a layer once the input of a group is known."""


@torch.no_grad()
def solve_groups(
    layer: nn.Module,
    hidden: Hidden,
    arguments: Arguments,
    linears: Mapping[str, nn.Linear],
    groups: list[tuple[str, ...]],
    solve: Callable[[tuple[str, ...], Hessian], None],
) -> None:
    """Quantize each of the `input_groups` in turn, for the inputs that those before it give: the samples run
    through the layer as far as the group, batch by batch, while their products are summed; then `solve`
    replaces the group's weights."""
    for names in groups:
        total: Hessian | None = None

        def reached(_: str, x: Tensor) -> None:
            nonlocal total
            total = add_products(total, x)
            raise _Reached

        with hooked(reading({names[0]: linears[names[0]]}, reached)):
            for start in range(0, len(hidden), BATCH_SAMPLES):
                batch = slice(start, start + BATCH_SAMPLES)
                with suppress(_Reached):
                    arguments.call(layer, hidden[batch], batch)
        assert total is not None
        solve(names, mirrored(total))

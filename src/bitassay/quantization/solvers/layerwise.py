"""Calibrated quantization, one decoder layer at a time.

The calibration text runs through the layers in order. Each layer is quantized for the inputs that it will
really get, those that the quantized layers before it put out; a second stream of the unquantized layers'
outputs is kept where a method wants to know what the layer should have said. Peak memory is the model, these
streams and the statistics of one layer. With a work folder every finished layer is a file there, and the same
call goes on after the last one.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.walk import decoder_layers, decoder_of

BATCH_SAMPLES = 8
CHUNK_ROWS = 8192
BLOCK_COLUMNS = 256
LEARNED_STREAMS = 4  # what learning a layer holds beside its input, as wide as it: measured on SmolLM2

Hidden = Float[Tensor, "samples *hidden"]
Samples = slice | Int[Tensor, " chosen"]


def memory_of(text_tokens: int, hidden: int, widest: int, streams: int) -> int:
    """Bytes of what one layer makes of a calibration text in fp32, roughly: at a gated MLP its two branches
    and their product, `widest` features each; the layer's input, the residual and the normed input; and
    `streams` more as wide as the hidden state."""
    return 4 * text_tokens * (3 * widest + (3 + streams) * hidden)


@dataclass(frozen=True)
class Arguments:
    """What a layer gets beside hidden states, for every sample. hidden_name: None where these come first.
    axis: of samples in hidden states as the layer takes them. handed: keys and values that layers of this
    stream have handed on to layers behind them."""

    given: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None
    axis: int
    samples: int
    handed: dict[str, list[Tensor]]

    def call(self, layer: Callable[..., Any], hidden: Hidden, which: Samples = slice(None)) -> Hidden:
        """The layer on these samples, of which `hidden` are the states."""
        places = torch.arange(self.samples, device=hidden.device)[which]
        handed: list[MutableMapping[str, Any]] = []

        def ready(leaf: Any) -> Any:
            if isinstance(leaf, _Handed):
                so_far = {key: tuple(one[places] for one in held) for key, held in self.handed.items()}
                handed.append(leaf.kind(so_far))
                return handed[-1]
            return leaf.of(places) if isinstance(leaf, _Rows) else leaf

        given, named = _mapped(self.given, ready), _mapped(self.named, ready)
        entering = hidden.movedim(0, self.axis)
        if self.hidden_name is None:
            given = (entering, *given)
        else:
            named[self.hidden_name] = entering
        output = hidden_of(layer(*given, **named), entering)
        for mapping in handed:
            for key, value in mapping.items():
                self._keep(key, value, places)
        return output.movedim(self.axis, 0)

    @property
    def differ(self) -> bool:
        """Whether samples have some of their own."""
        leaves: list[Any] = []
        _mapped((self.given, self.named), leaves.append)
        return any(isinstance(leaf, _Rows) and len(leaf.rows) > 1 for leaf in leaves)

    def _keep(self, key: str, value: Sequence[Tensor], places: Tensor) -> None:
        if key not in self.handed:
            self.handed[key] = [one.new_zeros(self.samples, *one.shape[1:]) for one in value]
        for held, one in zip(self.handed[key], value, strict=True):
            held[places] = one.detach().to(held.dtype)


class Stream(NamedTuple):
    """What enters a layer: hidden states, samples first, and each layer's other arguments."""

    hidden: Hidden
    arguments: list[Arguments]

    def beside(self) -> "Stream":
        """A stream that begins alike, and whose layers hand on what is their own."""
        handed: dict[str, list[Tensor]] = {}
        return Stream(self.hidden, [replace(one, handed=handed) for one in self.arguments])


class _Rows(NamedTuple):
    """A tensor with the samples along `axis`, each with one or more places there (a bias for each head); in
    `rows`, `[samples, places, ...]`, they are in front, or one that is everybody's."""

    rows: Tensor
    axis: int

    def of(self, places: Tensor) -> Tensor:
        alike = len(self.rows) == 1
        rows = self.rows.expand(len(places), *self.rows.shape[1:]) if alike else self.rows[places]
        return rows.flatten(0, 1).movedim(0, self.axis)


class _Handed(NamedTuple):
    """Stands for a mapping of that kind, into which layers put what layers behind them read."""

    kind: Callable[[dict[str, Any]], MutableMapping[str, Any]]


class _Call(NamedTuple):
    """One call of a layer: its arguments beside the hidden states, and the name of these."""

    layer: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None


class _Stop(Exception):
    """Ends a forward pass once the first layer's input is known."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, tokens: Int[Tensor, "samples tokens"]) -> Stream:
    """What the first decoder layer gets for these tokens, and the other arguments of every layer.

    What differs from sample to sample is found by a forward over two without a token in common. Raises
    BitassayError for a model whose layers, called one after the other with these arguments, do not give what
    the model gives.
    """
    layers = decoder_layers(model)
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    pair = torch.cat([tokens[:1], (tokens[:1] + 1) % size]).to(model.device)
    one, two = _Forward(model, pair[:1]), _Forward(model, pair)
    axis = _axis(one.hidden, two.hidden)
    if axis is None or [call.layer for call in two.calls] != list(layers):
        raise _not_one_by_one(model)
    trial = _stream(one, two, [two], axis, 2)
    hidden, wanted = trial.hidden, two.last.movedim(axis, 0).float()
    for layer, arguments in zip(layers, trial.arguments, strict=True):
        hidden = arguments.call(layer, hidden)
    if (hidden.float() - wanted).norm() > 1e-2 * wanted.norm():
        raise _not_one_by_one(model)
    parts = tokens.to(model.device).split(BATCH_SAMPLES)
    if any(one.differ for one in trial.arguments):  # each layer's own are known once the model runs
        return _stream(one, two, [_Forward(model, part) for part in parts], axis, len(tokens))
    entering = [_Forward(model, part, whole=False).hidden.movedim(axis, 0) for part in parts]
    return Stream(
        torch.cat(entering), [replace(one, samples=len(tokens)) for one in trial.beside().arguments]
    )


def _stream(one: "_Forward", two: "_Forward", batches: "list[_Forward]", axis: int, samples: int) -> Stream:
    """What entered the layers, by forwards over one sample, over two, and over all in batches."""
    handed: dict[str, list[Tensor]] = {}
    arguments = []
    for index, (few, many) in enumerate(zip(one.calls, two.calls, strict=True)):
        calls = [batch.calls[index] for batch in batches]
        given = _merged(few.given, many.given, [call.given for call in calls], two.written)
        named = _merged(few.named, many.named, [call.named for call in calls], two.written)
        arguments.append(Arguments(given, named, many.hidden_name, axis, samples, handed))
    return Stream(torch.cat([batch.hidden.movedim(axis, 0) for batch in batches]), arguments)


class _Forward:
    """The calls of the decoder layers in a forward over these tokens, what entered the first one, and what
    the last one put out. written: the mappings into which layers put something. Not `whole`: it ends in front
    of the first layer."""

    def __init__(self, model: PreTrainedModel, tokens: Int[Tensor, "samples tokens"], whole: bool = True):
        self.calls: list[_Call] = []
        self.hidden = self.last = torch.empty(0)
        seen: dict[int, tuple[Any, int]] = {}

        def before(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            name = None if given else "hidden_states"
            hidden = given[0] if name is None else named[name]
            rest = {key: value for key, value in named.items() if key != name}
            self.hidden = self.hidden if self.calls else hidden
            self.calls.append(_Call(layer, given[1:], rest, name))
            for value in (*given[1:], *rest.values()):
                if isinstance(value, MutableMapping):
                    seen.setdefault(id(value), (value, len(value)))
            if not whole:
                raise _Stop

        def after(_layer: nn.Module, _given: Any, output: Any) -> None:
            self.last = hidden_of(output, self.hidden)

        layers = decoder_layers(model)
        with (
            hooked(layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers),
            hooked(layer.register_forward_hook(after) for layer in layers),
            suppress(_Stop),
        ):
            decoder_of(model)(input_ids=tokens, use_cache=False)
        self.written = {place for place, (value, size) in seen.items() if len(value) != size}


def _merged(one: Any, two: Any, batches: list[Any], written: set[int]) -> Any:
    """Arguments of all samples, from those of one sample, of two, and of all in batches."""
    if isinstance(two, Tensor):
        axis = _axis(one, two)
        if axis is None:
            return two
        first, second = (part[None] for part in two.movedim(axis, 0).split(one.shape[axis]))
        if torch.equal(first, second):
            return _Rows(first, axis)
        several = [batch.movedim(axis, 0).unflatten(0, (-1, one.shape[axis])) for batch in batches]
        return _Rows(torch.cat(several), axis)
    if isinstance(two, Cache):
        return None  # nothing was cached
    if id(two) in written:
        return _Handed(type(two))
    if isinstance(two, Mapping):
        rest = {key: [batch[key] for batch in batches] for key in two}
        return {key: _merged(one[key], two[key], rest[key], written) for key in two}
    if isinstance(two, tuple | list):
        parts = zip(one, two, *batches, strict=True)
        return tuple(_merged(first, second, rest, written) for first, second, *rest in parts)
    return two


def _axis(one: Any, two: Tensor) -> int | None:
    """Along which one sample and two differ in size."""
    sizes = list(zip(one.shape, two.shape, strict=True))
    return next((axis for axis, (few, many) in enumerate(sizes) if few != many), None)


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with other leaves."""
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
    """The hidden states in what a layer returns: the first tensor of their shape."""
    parts = (output,) if isinstance(output, Tensor) else output
    return next(part for part in parts if isinstance(part, Tensor) and part.shape == entering.shape)


@torch.no_grad()
def run_layer(layer: Callable[..., Any], hidden: Hidden, arguments: Arguments) -> Hidden:
    """One layer on all samples."""
    places = torch.arange(len(hidden)).split(BATCH_SAMPLES)
    return torch.cat([arguments.call(layer, hidden[some], some) for some in places])


@torch.no_grad()
def input_groups(
    layer: nn.Module, hidden: Hidden, arguments: Arguments, linears: Mapping[str, nn.Linear]
) -> list[tuple[str, ...]]:
    """The linears of a layer, those that read the same tensor together, in the order of their calls."""
    groups: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # held, so that no other tensor takes over an identity

    def reads(name: str):
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            groups.setdefault(id(args[0]), []).append(name)

        return note

    with hooked(module.register_forward_pre_hook(reads(name)) for name, module in linears.items()):
        arguments.call(layer, hidden[:1], slice(0, 1))
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
    arguments: Arguments,
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

    with hooked(linears[names[0]].register_forward_pre_hook(arrive(names)) for names in groups):
        return arguments.call(layer, hidden)

"""Which parameters touch the residual stream of a decoder, and how: what its rotation has to know.

    h_0 = embedding;   h <- h + W_o attention(norm(h) W_q, ...);   h <- h + W_down mlp(norm(h) W_gate, ...)
    logits = norm(h) W_head

Matrices *read* a normed stream along their input dimension, or *write* to it along their output dimension,
with a bias or without. RMSNorm divides by a length, which no rotation changes, so it commutes with one as
soon as its gains are all the same; the gains of a norm that matrices read are folded into these. Gains after
a block (Gemma 2 and 3, OLMo 2) have no matrix behind them to go into, and LayerNorm subtracts a mean, which a
rotation does change: such models are refused by name. So is anything in the decoder that has no known role.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.opened import change_parameter, parameter_of, present
from bitassay.models.precision import exact
from bitassay.models.walk import Walk, decoder_layers, decoder_of, module_name, walk

ATTENTION_READS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
MLP_READS = ("gate_proj", "up_proj", "gate_up_proj")
WRITES = ("o_proj", "down_proj")
WITHIN_ATTENTION = ("q_b_proj", "kv_b_proj")
REMEDY = "rotation: {r1: null}, which leaves the residual stream as it is"
CHUNK_VALUES = 2**22  # of a parameter that are in fp64 at a time
ROWS, COLUMNS = -2, -1
PROBE_TOKENS = 16
PROBE_TOLERANCE = 1e-3  # of the logits' length; a wrong transform is off by about 1


def probe(model: PreTrainedModel) -> Float[Tensor, "tokens vocabulary"]:
    """Return logits on PROBE_TOKENS random tokens, the same at every call."""
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return exact(model(tokens.to(model.device), use_cache=False).logits[0])


@contextmanager
def unchanged(model: PreTrainedModel, done: str, transforms: str, remedy: str) -> Iterator[None]:
    """Raise BitassayError where what happens within the context changed the model's logits."""
    before = probe(model)
    yield
    change = ((probe(model) - before).norm() / before.norm()).item()
    if not change <= PROBE_TOLERANCE:
        raise BitassayError(
            f"{type(model).__name__}: {done}, its logits differ by {change:.2g} of their length: it does "
            f"something between its matrices that {transforms} do not know of",
            f"try {remedy}",
        )


class Weight(NamedTuple):
    """A parameter of a model by its full name, read in fp64 (`exact`) as `[..., out, in]` (a bias:
    `[..., out]`) and changed in its own dtype. A new value is a new parameter: a model that shares the old
    one keeps it. An opened model has the new value when it is needed."""

    model: nn.Module
    name: str
    transposed: bool = False

    def read(self) -> Float[Tensor, "..."]:
        value = exact(parameter_of(self.model, self.name), copy=True)
        return value.transpose(-1, -2) if self.transposed else value

    def change(self, function: Callable[[Tensor], Tensor], each: int | None = None) -> None:
        """Replace the value by a function of it. each: ROWS or COLUMNS, where these do not depend on each
        other and may come in parts."""
        change_parameter(self.model, self.name, partial(_changed, function, self.transposed, each))


def _changed(
    function: Callable[[Tensor], Tensor], transposed: bool, each: int | None, stored: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    old = stored.transpose(-1, -2) if transposed else stored
    if each is None:
        new = function(exact(old, copy=True)).to(old.device, old.dtype)
    else:
        new, count = torch.empty_like(old), max(1, CHUNK_VALUES * old.shape[each] // old.numel())
        for part, place in zip(old.split(count, each), new.split(count, each), strict=True):
            place.copy_(function(exact(part, copy=True)))
    return (new.transpose(-1, -2) if transposed else new).contiguous()


class Norm(NamedTuple):
    """An RMSNorm with the gains `offset + weight`: offset is 0, or 1 in Gemma's."""

    weight: Weight
    offset: float

    @property
    def module(self) -> nn.Module:
        return self.weight.model.get_submodule(self.weight.name.rpartition(".")[0])

    def gain(self) -> Float[Tensor, " hidden"]:
        return self.offset + self.weight.read()

    def set_to_one(self) -> None:
        self.weight.change(lambda value: torch.full_like(value, 1 - self.offset))


@dataclass(frozen=True)
class LayerStream:
    """What a decoder layer does to the stream. reads: norms, and the matrices behind them."""

    reads: list[tuple[Norm | None, list[Weight]]]
    writes: list[Weight]
    biases: list[Weight]


@dataclass(frozen=True)
class ResidualStream:
    """head: the output matrix, which reads what `final_norm` puts out; it may be the embedding itself."""

    embedding: Weight
    layers: list[LayerStream]
    final_norm: Norm
    head: Weight


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """Return all that touches the stream. Raises BitassayError for what cannot go along with a rotation."""
    around, embedding = decoder_of(model), model.get_input_embeddings()
    head, final = model.get_output_embeddings(), getattr(around, "norm", None)
    if not isinstance(head, nn.Linear) or not isinstance(final, nn.Module):
        raise BitassayError(f"{type(model).__name__}: found no final norm and linear output head", REMEDY)
    prefix = f"{module_name(model, decoder_layers(model))}."
    modules = walk(model)
    known = {id(parameter) for part in (embedding, head, final) for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix) and id(parameter) not in known:
            raise BitassayError(f"{name}: no known role beside the residual stream", REMEDY)
    return ResidualStream(
        Weight(model, f"{module_name(model, embedding)}.weight"),
        [
            _layer_stream(model, modules, layer, f"{prefix}{index}.")
            for index, layer in enumerate(decoder_layers(model))
        ],
        find_norm(model, module_name(model, final)),
        Weight(model, f"{module_name(model, head)}.weight"),
    )


def find_norm(model: nn.Module, name: str) -> Norm:
    """Return how the RMSNorm of that full name uses its weight, by running it. Raises BitassayError where it
    is none."""
    module = model.get_submodule(name)
    with present(model, name):
        offset = _offset(module)
    if offset is None:
        raise BitassayError(
            f"{name}: {type(module).__name__} is no RMSNorm: a rotation changes what it does", REMEDY
        )
    return Norm(Weight(model, f"{name}.weight".removeprefix(".")), offset)


def _offset(module: nn.Module) -> float | None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        generator = torch.Generator().manual_seed(0)
        x = 1000 * torch.randn(4, len(weight), generator=generator) + 500  # far above any epsilon
        x = x.to(weight.device, weight.dtype)
        bare = exact(x) / exact(x).square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            expected = bare * (offset + exact(weight))
            if (exact(module(x)) - expected).norm() <= 1e-3 * expected.norm():
                return offset
    return None


def _layer_stream(model: PreTrainedModel, modules: Walk, layer: nn.Module, here: str) -> LayerStream:
    """`here` is the layer's full name and a dot."""
    attention, mlp, writes, biases = [], [], [], []
    for name, linear in modules.linears.items():
        child = name.rpartition(".")[2]
        if not name.startswith(here) or child in WITHIN_ATTENTION:
            continue
        if child in WRITES:
            writes.append(Weight(model, f"{name}.weight"))
            biases += [Weight(model, f"{name}.bias")] if linear.bias is not None else []
        elif child in ATTENTION_READS or child in MLP_READS:
            (attention if child in ATTENTION_READS else mlp).append(Weight(model, f"{name}.weight"))
        else:
            raise BitassayError(f"{name}: no known role in the residual stream", REMEDY)
    for name in (name for name in modules.experts if name.startswith(here)):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = Weight(model, name, transposed=bool(getattr(module, "is_transposed", False)))
        (writes if key in WRITES else mlp).append(weight)
        if key in WRITES and getattr(module, f"{key}_bias", None) is not None:
            biases.append(Weight(model, f"{name}_bias"))
    for name in (name for name in modules.routers if name.startswith(here)):
        mlp.append(Weight(model, name))
    if other := next((name for name in modules.others if name.startswith(here)), None):
        raise BitassayError(f"{other}: no known role in the residual stream", REMEDY)
    attention_norm, mlp_norm = _read_norms(model, layer, here)
    return LayerStream([(attention_norm, attention), (mlp_norm, mlp)], writes, biases)


def _read_norms(model: PreTrainedModel, layer: nn.Module, here: str) -> tuple[Norm | None, Norm | None]:
    """Return the norms that attention and MLP read. All others come after a block: with equal gains."""
    norms = {
        name: find_norm(model, here + name)
        for name, module in layer.named_children()
        if name.endswith("norm") and any(True for _ in module.parameters())
    }
    if "pre_feedforward_layernorm" in norms:
        reads = ("input_layernorm", "pre_feedforward_layernorm")
    elif "input_layernorm" in norms:
        reads = ("input_layernorm", "post_attention_layernorm")
    else:
        reads = ("", "")
    for name, norm in norms.items():
        gain = norm.gain()
        if name not in reads and not torch.equal(gain, gain[:1].expand_as(gain)):
            raise BitassayError(
                f"{here}{name}: its gains come after the block, where no matrix can take them up", REMEDY
            )
    return norms.get(reads[0]), norms.get(reads[1])

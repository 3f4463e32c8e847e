"""Rotations that leave a model's logits as they are and its matrices easier to round.

With Q orthogonal, `x W^T = (x Q)(W Q)^T`: rotate both, and the outliers of either spread over all
coordinates. Three places take a rotation:

    R1  the residual stream, h -> h Q. The gains of the norms go into the matrices that read them; then
        embedding -> E Q, reading matrices W -> W Q, writing ones W -> Q^T W and their biases b -> b Q.
          folded  the embedding and the head change, so a head that was the embedding becomes a matrix of its
                  own, which costs its size; for all layers
          online  the stream is rotated where the chosen layers begin and back where they end: two products
                  with Q at run time for each run of neighbouring layers; embedding and head do not change
    R2  the values of each head, v -> v Q, undone by the output projection; one Q a layer
    R4  the input of the down projection, at run time: x -> x H, W -> W H

kinds: `hadamard`, fixed; `random-hadamard`, random signs first; `orthogonal`, uniformly random (R4 is a
random Hadamard matrix even then, as it is paid for at run time); `refined`, R1 improved by `refine` on
calibration tokens. What happens at run time follows from the recipe and the shapes alone (`add_online`).

Every rotated model is run on a few tokens and compared with what it said before: an architecture that does
something unknown between the matrices is refused, not broken.

Sources: QuaRot (2404.00456, sections 3 and 4); R1, R2, R4 are SpinQuant's names (2405.16406); refinement:
DFRot (2412.00648, section 4). Left out: the rotation of queries and keys for a quantized cache (R3), learned
rotations (SpinQuant's Cayley descent).
"""

import random
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.config import untie
from bitassay.models.hooks import hooked
from bitassay.models.lockstep import Forward, in_step
from bitassay.models.opened import Unread, weights_of
from bitassay.models.opened_weights import HALVES
from bitassay.models.walk import decoder_layers, decoder_of, module_name
from bitassay.quantization.codes.hadamard import Orthogonal, block_hadamard, hadamard, random_orthogonal
from bitassay.quantization.recipe.transforms import Rotation
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.transforms.procrustes import refine
from bitassay.quantization.transforms.residual_stream import (
    COLUMNS,
    ROWS,
    ResidualStream,
    Weight,
    residual_stream,
    unchanged,
)

REFINE_ROWS = 4096


@torch.no_grad()
def rotate(model: PreTrainedModel, rotation: Rotation, tokens: Tokens | None = None) -> None:
    """Rotate a working copy in place, products in fp64; what it computes stays the same. A copy in 16 bits is
    in fp32 afterwards: rounded to 16 bits again, rotated weights are no longer quite the model's. Only new
    parameters are made: another model that shares the old ones keeps them. `tokens` are for `refined`. Raises
    BitassayError that names the part of an architecture that cannot be rotated."""
    chosen = rotation.chosen(len(decoder_layers(model)))
    if not chosen:
        return
    _to_fp32(model)
    with unchanged(model, "rotated", "rotations", "r1, r2 and r4 one at a time, or no rotation"):
        if rotation.r1 is not None:
            _rotate_stream(model, rotation, chosen, tokens)
        for index in chosen:
            if rotation.r2:
                _rotate_values(model, rotation, index)
            if rotation.r4:
                for name, down in _down_projections(model, index):
                    q = _orthogonal(rotation, down.in_features, "r4", name)
                    Weight(model, f"{name}.weight").change(q.apply, ROWS)
        add_online(model, rotation)


def _rotate_stream(
    model: PreTrainedModel, rotation: Rotation, chosen: list[int], tokens: Tokens | None
) -> None:
    stream = residual_stream(model)
    q = _orthogonal(rotation, model.get_parameter(stream.embedding.name).shape[-1], "r1")
    layers = [stream.layers[index] for index in chosen]
    for norm, weights in (read for layer in layers for read in layer.reads):
        if norm is not None:
            for weight in weights:
                weight.change(partial(torch.mul, norm.gain()), ROWS)
            norm.set_to_one()
    if rotation.r1 == "folded":
        # The final norm's gains go into the head, which is its own matrix from here on.
        stream.head.change(partial(torch.mul, stream.final_norm.gain()), ROWS)
        stream.final_norm.set_to_one()
        untie(model)
        if rotation.kind == "refined":
            q = refine(_normed_stream(model, stream, tokens), q, rotation.rounds)
        for weight in (stream.embedding, stream.head):
            weight.change(q.apply, ROWS)
    for layer in layers:
        for weight in (weight for _, weights in layer.reads for weight in weights):
            weight.change(q.apply, ROWS)
        for bias in layer.biases:
            bias.change(q.apply)
        for weight in layer.writes:
            weight.change(lambda out: q.apply(out.transpose(-1, -2)).transpose(-1, -2), COLUMNS)


def add_online(model: PreTrainedModel, rotation: Rotation) -> None:
    """Give a model whose weights are rotated what happens at run time, unless it has that already."""
    present = getattr(model, "online_rotation", None)
    assert present in (None, rotation), "the model has another rotation already"
    layers = decoder_layers(model)
    chosen = rotation.chosen(len(layers))
    if present is not None or not rotation.online or not chosen:
        return
    if rotation.r1 == "online":
        embedding = model.get_input_embeddings()
        q = _orthogonal(rotation, embedding.get_parameter("weight").shape[-1], "r1")
        # On outputs only: a hook on a layer's input would rotate twice what is captured and put in again.
        for first, last in _runs(chosen):
            begin = layers[first - 1] if first else embedding
            begin.register_forward_hook(_Rotate(q).output)
            layers[last].register_forward_hook(_Rotate(q, back=True).output)
    if rotation.r4:
        for index in chosen:
            for name, down in _down_projections(model, index):
                q = _orthogonal(rotation, down.in_features, "r4", name)
                down.register_forward_pre_hook(_Rotate(q).input)
    object.__setattr__(model, "online_rotation", rotation)


def changed_parameters(
    base: PreTrainedModel, changed: PreTrainedModel, but: Collection[str] = ()
) -> Mapping[str, Tensor]:
    """Return every parameter of `changed` that is not the base model's, by full name, new ones too, except
    those in `but`; an output head that was tied in the base model has a name of its own. Those of opened
    models are made when they are asked for."""
    before_it, weights = weights_of(base), weights_of(changed)
    if before_it is not None and weights is not None:

        def as_before(name: str) -> bool:
            old = before_it.value(name)
            return torch.equal(weights.value(name).to(old.dtype), old)

        names = [name for name in weights.empty if name in weights.changes and name not in but]
        names = [name for name in names if not as_before(name)]
        names += [name for name, _ in changed.named_parameters() if name not in weights.empty]
        return Unread({name: partial(weights.value, name) for name in names})
    before = dict(base.named_parameters(remove_duplicate=False))

    def same(name: str, value: Tensor) -> bool:
        old = before.get(name)
        return old is not None and (value is old or torch.equal(value.to(old.dtype), old))

    after = changed.named_parameters(remove_duplicate=False)
    return {name: value.detach() for name, value in after if name not in but and not same(name, value)}


def _to_fp32(model: PreTrainedModel) -> None:
    """New parameters in fp32 for those in 16 bits; what was one parameter stays one."""
    if (weights := weights_of(model)) is not None:
        weights.widen()
        return
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.dtype in HALVES:
                if parameter not in wide:
                    wide[parameter] = nn.Parameter(parameter.detach().float(), requires_grad=False)
                module.register_parameter(key, wide[parameter])


def _rotate_values(model: PreTrainedModel, rotation: Rotation, index: int) -> None:
    layer = decoder_layers(model)[index]
    attention, name = getattr(layer, "self_attn", None), module_name(model, layer)
    keys = [key for key in ("v_proj", "kv_b_proj", "qkv_proj") if getattr(attention, key, None) is not None]
    source = getattr(attention, keys[0]) if keys else None
    back = getattr(attention, "o_proj", None)
    if not isinstance(source, nn.Linear) or not isinstance(back, nn.Linear) or hasattr(attention, "v_norm"):
        raise BitassayError(
            f"{name}: found no linears for values and output with nothing but attention between them",
            "rotation: {r2: false}",
        )
    config = model.config.get_text_config()
    size: int = getattr(attention, "v_head_dim", None) or attention.head_dim  # type: ignore[union-attr, assignment]
    q = _orthogonal(rotation, size, "r2", name)
    rows = torch.arange(source.out_features)
    if keys[0] == "kv_b_proj":  # keys without position and values, head by head
        rows = rows.view(config.num_attention_heads, -1)[:, -size:]
    elif keys[0] == "qkv_proj":
        rows = rows[-config.num_key_value_heads * size :]
    rows = rows.reshape(-1, size)

    def turned(values: Tensor) -> Tensor:
        """Rotate each head's rows of a weight, or numbers of a bias."""
        of_heads = values[rows.to(values.device)]
        heads = q.apply(of_heads.transpose(1, 2)).transpose(1, 2) if values.ndim == 2 else q.apply(of_heads)
        return values.index_put((rows.to(values.device),), heads)

    where = f"{name}.self_attn"
    Weight(model, f"{where}.{keys[0]}.weight").change(turned, COLUMNS)
    if source.bias is not None:
        Weight(model, f"{where}.{keys[0]}.bias").change(turned)
    Weight(model, f"{where}.o_proj.weight").change(
        lambda out: q.apply(out.reshape(len(out), -1, size)).view_as(out), ROWS
    )


def _down_projections(model: PreTrainedModel, index: int) -> Iterator[tuple[str, nn.Linear]]:
    """Yield them by name. Raises BitassayError where there are none, or experts are fused."""
    layer, any_found = decoder_layers(model)[index], False
    for name, module in layer.named_modules(prefix=module_name(model, layer)):
        if isinstance(getattr(module, "down_proj", None), nn.Parameter):
            raise BitassayError(
                f"{name}: fused experts have no place for an online rotation before their down projections",
                "rotation: {r4: false}, or layers without experts",
            )
        if name.endswith(".down_proj") and hasattr(module, "in_features"):
            any_found = True
            yield name, module  # type: ignore[misc]  # an nn.Linear, or a packed one in its place
    if not any_found:
        raise BitassayError(f"{module_name(model, layer)}: found no down_proj", "rotation: {r4: false}")


def _orthogonal(rotation: Rotation, size: int, place: str, name: str = "") -> Orthogonal:
    """Return the rotation of that size for `r1`, `r2` or `r4`, the same at every call."""
    seed = random.Random(f"{rotation.seed} {place} {name}").getrandbits(63)
    generator = torch.Generator().manual_seed(seed)
    if rotation.kind == "orthogonal" and place != "r4":
        return random_orthogonal(size, generator)
    fast = hadamard(size, None if rotation.kind == "hadamard" else generator)
    if fast is not None:
        return fast
    if rotation.without_hadamard == "refuse":
        raise BitassayError(
            f"rotation: {place} needs a Hadamard matrix of order {size}, and there is none here",
            "without_hadamard: orthogonal or blocks",
        )
    make = random_orthogonal if rotation.without_hadamard == "orthogonal" else block_hadamard
    return make(size, generator)


def _runs(chosen: list[int]) -> list[tuple[int, int]]:
    """Return first and last of each run of neighbours."""
    ends = [i for i, (a, b) in enumerate(pairwise(chosen)) if b > a + 1]
    starts = [0, *(end + 1 for end in ends)]
    return [(chosen[a], chosen[b]) for a, b in zip(starts, [*ends, len(chosen) - 1], strict=True)]


class _Rotate:
    """Forward hooks that rotate what goes into a module, or what comes out of it."""

    def __init__(self, q: Orthogonal, back: bool = False):
        self.q, self.back = q, back

    def __call__(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        work = torch.promote_types(x.dtype, torch.float32)
        factor = self.q.factors[0]
        if factor.device != x.device or factor.dtype != work:
            self.q = self.q.to(x.device, work)
        return self.q.apply_transposed(x) if self.back else self.q.apply(x)

    def input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def _normed_stream(
    model: PreTrainedModel, stream: ResidualStream, tokens: Tokens | None
) -> Float[Tensor, "rows hidden"]:
    """Return rows of what the norms put out, about REFINE_ROWS of them, evenly from all layers."""
    if tokens is None:
        raise BitassayError("rotation: refined needs calibration text", "a recipe with calibration")
    norms = [norm.module for layer in stream.layers for norm, _ in layer.reads if norm is not None]
    every = max(1, len(norms) * tokens.numel() // REFINE_ROWS)
    rows: list[list[Tensor]] = [[] for _ in norms]  # whatever runs first, a norm sees batch after batch

    def keep(
        seen: list[Tensor], _norm: nn.Module, _args: tuple[Any, ...], output: Float[Tensor, "..."]
    ) -> None:
        seen.append(output.reshape(-1, output.shape[-1])[::every].float())

    def run(batch: Tokens) -> None:
        with torch.no_grad():
            decoder_of(model)(input_ids=batch.to(model.device), use_cache=False)

    kept = (norm.register_forward_hook(partial(keep, seen)) for norm, seen in zip(norms, rows, strict=True))
    with hooked(kept):
        for _ in in_step([Forward(model, partial(run, batch)) for batch in tokens.split(8)]):
            pass
    return torch.cat([part for seen in rows for part in seen])

"""The KV cache in few bits: keys and values are rounded as they enter it, and attention reads only those.

Every head's key and every head's value of one token (or each group of neighbours in it) has a scale of its
own, and asymmetric a zero point, by absmax as for weights. Keys are rounded as they are cached, which is
after the rotary embedding. A token's own key and value are rounded before its own query meets them, so that
one forward over a text without any cache reads the same numbers as generation token by token.

    round_cache(model, spec)  on every attention module, what goes into the cache is rounded, whatever cache
                              there is, or none; entries take what they took
    PackedCache(config, spec) a transformers cache that stores codes, scales and zero points as bytes, and
                              dequantizes all of them at each read: `generate` uses it

Sources: KIVI (2402.02750) rounds values per token as here, but keys per channel, which needs a residual of
recent tokens in 16 bits; that is left out. So are formats below 4 bits, which without it are of no use.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.cache import keeps_positions
from bitassay.models.walk import decoder_layers
from bitassay.quantization.codes.grid import Grid, joined, split
from bitassay.quantization.codes.packing import PACKINGS, pack, unpack
from bitassay.quantization.codes.rounding import dequantize, round_to_nearest, rounded_matrix
from bitassay.quantization.codes.scales import absmax_grid
from bitassay.quantization.recipe.inputs import KvCache


def packed_bytes(spec: KvCache, width: int) -> int:
    """Return the bytes of one vector of `width` numbers: codes, scales, zero points."""
    return sum(_part_bytes(spec, width))


def _part_bytes(spec: KvCache, width: int) -> tuple[int, int, int]:
    _, count = spec.groups.scale_shape(1, width)
    codes = PACKINGS[spec.number_format.bits].packed_bytes(width)
    return codes, count * getattr(torch, spec.scale_dtype).itemsize, 0 if spec.symmetric else count


def token_bytes(config: PretrainedConfig, spec: KvCache | None) -> int:
    """Return the bytes of a token in all caches, at 16 bits without a `spec`. Raises BitassayError for a
    model whose cache does not hold a key and a value a head."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is not None:
        raise BitassayError(f"{text.model_type} caches a compressed state: its size is not counted here")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    vector = 2 * width if spec is None else packed_bytes(spec, width)
    return 2 * text.num_hidden_layers * heads * vector


def encode(vectors: Float[Tensor, "... width"], spec: KvCache) -> UInt8[Tensor, "... bytes"]:
    """Return each vector (last dimension) as its codes, scales and zero points, one after the other."""
    width, fmt = vectors.shape[-1], spec.number_format
    rows = vectors.reshape(-1, width)
    grids = _grids(rows.float(), spec)
    groups = zip(spec.groups.to_groups(rows.float()), grids, strict=True)
    codes = spec.groups.from_groups([round_to_nearest(group, grid) for group, grid in groups], len(rows))
    grid = joined(spec.groups, grids, len(rows))
    if fmt.float_dtype is not None:
        parts = [codes.to(fmt.float_dtype).view(torch.uint8)]
    else:
        digits = PACKINGS[fmt.bits].digits
        raw = nn.functional.pad(codes - fmt.code_range(spec.symmetric)[0], (0, -width % digits))
        parts = [pack(raw.to(torch.uint8), fmt.bits).view(len(rows), -1)]
    parts.append(grid.scale.to(getattr(torch, spec.scale_dtype)).view(torch.uint8))
    if grid.zero_point is not None:
        parts.append(grid.zero_point.to(torch.uint8))
    return torch.cat(parts, dim=1).view(*vectors.shape[:-1], -1)


def decode(
    packed: UInt8[Tensor, "... bytes"], width: int, spec: KvCache, dtype: torch.dtype
) -> Float[Tensor, "... width"]:
    """Return the vectors that `encode` made these bytes of, as they read back."""
    rows, fmt = packed.reshape(-1, packed.shape[-1]), spec.number_format
    raw, scale, zero_point = rows.split(_part_bytes(spec, width), dim=1)
    if fmt.float_dtype is not None:
        codes = raw.contiguous().view(fmt.float_dtype).float()
    else:
        padded = raw.shape[1] * PACKINGS[fmt.bits].digits // PACKINGS[fmt.bits].width
        codes = unpack(raw.reshape(-1), fmt.bits, len(rows) * padded).view(len(rows), padded)[:, :width]
        codes = codes.float() + fmt.code_range(spec.symmetric)[0]
    scales = scale.contiguous().view(getattr(torch, spec.scale_dtype)).float()
    grids = split(spec.groups, Grid(fmt, scales, None if spec.symmetric else zero_point.float()), width)
    groups = zip(spec.groups.to_groups(codes), grids, strict=True)
    vectors = spec.groups.from_groups([dequantize(q, grid) for q, grid in groups], len(rows))
    return vectors.to(dtype).view(*packed.shape[:-1], width)


def rounded(vectors: Float[Tensor, "... width"], spec: KvCache) -> Float[Tensor, "... width"]:
    """Return what `decode(encode(vectors))` is, without the bytes between."""
    rows = vectors.reshape(-1, vectors.shape[-1]).float()
    return rounded_matrix(rows, _grids(rows, spec), spec.groups).to(vectors.dtype).view(vectors.shape)


def _grids(rows: Float[Tensor, "vectors width"], spec: KvCache) -> list[Grid]:
    grids = []
    for group in spec.groups.to_groups(rows):
        grid = absmax_grid(group, spec.number_format, spec.symmetric, getattr(torch, spec.scale_dtype))
        # No code stands for NaN or infinity: the scale carries it.
        grids.append(grid._replace(scale=grid.scale + group.abs().amax(1, keepdim=True) * 0))
    return grids


class PackedCache(DynamicCache):
    """A DynamicCache that stores the bytes of `encode`, and reads them by `decode`. Cropping, reordering and
    sliding windows are DynamicCache's own: they move tokens and never look into them."""

    def __init__(self, config: PretrainedConfig, spec: KvCache):
        super().__init__(config=config)
        self.spec = spec

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(
            encode(key_states, self.spec), encode(value_states, self.spec), layer_idx, *args, **kwargs
        )
        return (
            decode(keys, key_states.shape[-1], self.spec, key_states.dtype),
            decode(values, value_states.shape[-1], self.spec, value_states.dtype),
        )

    @property
    def stored_bytes(self) -> int:
        """What all layers hold."""
        held = [part for keys, values, _ in self for part in (keys, values) if part is not None]
        return sum(part.nbytes for part in held)


def round_cache(model: PreTrainedModel, spec: KvCache) -> None:
    """Make `model` round all that its attention caches. Raises BitassayError for layers without any."""
    layers = decoder_layers(model)
    attentions = [module for layer in layers if (module := getattr(layer, "self_attn", None)) is not None]
    if len(attentions) < len(layers):
        index = next(i for i, layer in enumerate(layers) if getattr(layer, "self_attn", None) is None)
        raise BitassayError(
            f"{type(model).__name__}: layer {index} has no self_attn to round the cache of",
            "leave kv_cache out of the recipe",
        )
    for attention in attentions:
        attention.register_forward_pre_hook(partial(_round_entry, spec), with_kwargs=True)
    object.__setattr__(model, "kv_cache", spec)  # nn.Module's own is for tensors and modules


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """Return the cache for a new text: packed where `round_cache` was applied to `model`."""
    spec = getattr(model, "kv_cache", None)
    return PackedCache(model.config, spec) if spec is not None else DynamicCache(config=model.config)


def cache_to_crop(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache from which tokens can be taken again. Raises BitassayError for states."""
    if not keeps_positions(model):
        raise BitassayError(
            f"{type(model).__name__} keeps a state from which no token can be taken away again",
            "a model with attention alone",
        )
    cache = empty_cache(model)
    cache.activate_past_recording()  # windows that slide
    return cache


def _round_entry(spec: KvCache, _module: nn.Module, arguments: tuple, options: dict[str, Any]) -> Any:
    cache = options.get("past_key_values")
    # A packed cache, or what stands for one while a copy of a layer runs, rounds by itself.
    if getattr(cache, "spec", None) == spec:
        return arguments, options
    return arguments, options | {"past_key_values": _RoundedUpdates(cache, spec)}


class _RoundedUpdates:
    """Stands for a cache, or for none, in one call of an attention module: rounds what is added to it."""

    def __init__(self, cache: Cache | None, spec: KvCache):
        self._cache, self._spec = cache, spec

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = rounded(key_states, self._spec), rounded(value_states, self._spec)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

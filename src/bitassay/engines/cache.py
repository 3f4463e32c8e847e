"""A KV cache that keeps keys and values in few bits.

Each head's vector of one token is rounded to nearest on a symmetric grid of 2^bits - 1 levels with a scale of
its own (absmax / (2^(bits-1) - 1)), as it enters the cache. The codes are kept dense: this shows what the
rounding does to the model, not how much memory it saves.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from bitassay.errors import BitassayError


class RoundedCache(DynamicCache):
    """A DynamicCache whose entries are rounded to `bits` (2 to 8)."""

    def __init__(self, config: PretrainedConfig, bits: int):
        if not 2 <= bits <= 8:
            raise BitassayError(f"a KV cache of {bits} bits", "2 to 8")
        super().__init__(config=config)
        self.bits = bits

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = rounded(key_states, self.bits), rounded(value_states, self.bits)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def rounded(
    vectors: Float[Tensor, "batch heads tokens width"], bits: int
) -> Float[Tensor, "batch heads tokens width"]:
    """Each vector (last dimension) rounded to `bits` on its own scale, in the dtype that it came in."""
    largest = 2 ** (bits - 1) - 1
    exact = vectors.float()
    scale = exact.abs().amax(-1, keepdim=True) / largest
    return ((exact / scale.clamp(min=torch.finfo(torch.float32).tiny)).round() * scale).to(vectors.dtype)

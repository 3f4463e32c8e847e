"""The output head on the last positions alone."""

import torch
from jaxtyping import Int
from torch import Tensor


def last_positions(count: int, device: torch.device) -> Int[Tensor, " count"]:
    """What a forward's `logits_to_keep` takes for its last `count` positions, which must be there.

    Indices, not a number: of a number transformers takes a slice, and before torch multiplies a slice with
    strides it copies the head's whole weight, once for each sequence of the batch.
    """
    return torch.arange(-count, 0, device=device)

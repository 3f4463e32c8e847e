"""The output head on the last positions alone."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.models.cache import takes
from bitassay.models.walk import decoder_of


def last_positions(count: int, device: torch.device) -> Int[Tensor, " count"]:
    """What a forward's `logits_to_keep` takes for its last `count` positions, which must be there.

    Indices, not a number: of a number transformers takes a slice, and before torch multiplies a slice with
    strides it copies the head's whole weight, once for each sequence of the batch.
    """
    return torch.arange(-count, 0, device=device)


def last_logits(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """The options of a forward that wants its last `count` logits: these alone, or all where the model cannot
    say fewer, or then leaves positions out of its layers too (Gemma 4, behind those that hand on keys)."""
    if not takes(model, "logits_to_keep") or takes(decoder_of(model), "logits_to_keep"):
        return {}
    return {"logits_to_keep": last_positions(count, model.device)}

"""Rotary embeddings with another base, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def rotary_base_times(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """Multiply the base of all rotary embeddings by `factor` within the context: frequency i of n is divided
    by factor^(i / n). A model without them stays as it is."""
    tables = rotary_frequencies(model)
    try:
        for module, name, frequencies in tables:
            count = frequencies.numel()
            steps = torch.arange(count, device=frequencies.device)
            setattr(module, name, frequencies / factor ** (steps / count))
        yield
    finally:
        for module, name, frequencies in tables:
            setattr(module, name, frequencies)


def rotary_frequencies(model: PreTrainedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the rotary frequencies that a model computes with, each with its module and name: models may
    have some for each kind of layer, or none. Copies of those before any scaling are left out."""
    return [
        (module, name, frequencies)
        for module in model.modules()
        for name, frequencies in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]

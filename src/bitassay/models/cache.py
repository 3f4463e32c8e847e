"""What a model keeps of the text that it has read, and what follows for reading several texts at once.

Attention keeps a key and a value for each position: texts of different lengths are read together with padding
that a mask hides, and a cache can be cut. Convolutions, linear attention and Mamba keep a state that every
token changes, padding too, and that cannot be taken back; some models keep things of their own beside keys.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

# Exactly these: what a model derives from them keeps more than keys and values.
BY_POSITION = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)


def takes(model: PreTrainedModel, *names: str) -> bool:
    """Whether the model's forward has arguments of these names."""
    return set(names) <= inspect.signature(model.forward).parameters.keys()


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model reads on from transformers' DynamicCache; others are given the whole text each time."""
    return takes(model, "past_key_values") and model._supports_default_dynamic_cache()


def keeps_positions(model: PreTrainedModel) -> bool:
    """Whether all that a model keeps has a place for each position, so that padding does no harm."""
    if not (takes_cache(model) and takes(model, "attention_mask", "position_ids")):
        return False
    return _by_position(DynamicCache(config=model.config))


def reads_on(model: PreTrainedModel) -> bool:
    """Whether a model reads several tokens more behind a cache."""
    return keeps_positions(model)


def copy_rows(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> DynamicCache:
    """A cache whose rows are these rows of `cache`, which stays as it is."""
    if _by_position(cache):
        copied = copy.copy(cache)  # selecting makes new tensors
        copied.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        copied = copy.deepcopy(cache)  # states are changed in place
    select_rows(copied, rows, device)
    return copied


def select_rows(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> None:
    """Leave these rows in a cache."""
    places = torch.tensor(rows, device=device)
    if _by_position(cache):
        cache.batch_select_indices(places)
    else:
        cache.reorder_cache(places)  # which states have too


def _by_position(cache: DynamicCache) -> bool:
    return all(type(layer) in BY_POSITION for layer in cache.layers)


def stored_bytes(cache: DynamicCache) -> int:
    """What all layers of a cache hold."""
    return sum(part.nbytes for layer in cache.layers for part in _tensors(vars(layer)))


def _tensors(held: Any) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    return [part for one in held.values() for part in _tensors(one)] if isinstance(held, dict) else []

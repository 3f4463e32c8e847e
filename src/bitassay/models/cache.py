"""What a model keeps of the text that it has read, and what follows for reading several texts at once.

Attention keeps a key and a value for each position: texts of different lengths are read together with padding
that a mask hides, and one beginning can be read once for several texts. Convolutions, linear attention and
Mamba keep a state that every token changes, padding too. Whether transformers reads several tokens behind
such a state, or takes it up for one token at a time only, differs from model to model, and is tried.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from bitassay.models.positions import padded_positions

# Exactly these: what a model derives from them keeps more than keys and values.
BY_POSITION = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
TRIED, TRIED_BEHIND = 8, 40  # tokens that `reads_on` tries behind so many others
_reads_on: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_takes_positions: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes(model: nn.Module, *names: str) -> bool:
    """Whether a model's forward has arguments of these names."""
    return set(names) <= inspect.signature(model.forward).parameters.keys()


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told positions that are counted from 0."""
    if model not in _takes_positions:
        _takes_positions[model] = takes(model, "position_ids") and padded_positions(model) is None
    return _takes_positions[model]


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model reads on from transformers' DynamicCache; others are given the whole text each time."""
    return _argument(model) is not None and model._supports_default_dynamic_cache()


def _argument(model: nn.Module) -> str | None:
    """The name under which a cache goes to a forward."""
    return next((name for name in ("past_key_values", "cache_params") if takes(model, name)), None)


def behind(model: nn.Module, cache: DynamicCache, begun: int, tokens: torch.Tensor) -> dict[str, Any]:
    """The options of a forward that reads `tokens` behind the `begun` of each row that are in the cache.
    Positions are said where they can be: not every model counts what its cache holds."""
    options: dict[str, Any] = {"use_cache": True, str(_argument(model)): cache}
    if takes_positions(model):
        positions = torch.arange(begun, begun + tokens.shape[1], device=tokens.device)
        options["position_ids"] = positions.expand(tokens.shape)
    return options


def keeps_positions(model: PreTrainedModel) -> bool:
    """Whether all that a model keeps has a place for each position, so that padding does no harm."""
    padded = takes(model, "past_key_values", "attention_mask") and takes_positions(model)
    return padded and takes_cache(model) and _by_position(DynamicCache(config=model.config))


@torch.inference_mode()
def reads_on(model: PreTrainedModel) -> bool:
    """Whether a model reads several tokens behind a cache as it reads them in one text.

    Of keys and values that is known. Of other states it is tried: read together, tokens must be as near to
    those of one text as they are one by one. In few bits such a difference would not be seen, so there the
    answer is no.
    """
    if not takes_cache(model):
        return False
    if _by_position(DynamicCache(config=model.config)):
        return True
    if model.dtype != torch.float32:
        return False
    if model not in _reads_on:
        _reads_on[model] = _tried(model)
    return _reads_on[model]


def _tried(model: PreTrainedModel) -> bool:
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = (7 * torch.arange(TRIED_BEHIND + TRIED) + 3)[None].to(model.device) % size
    wanted = model(input_ids=tokens, use_cache=False).logits[:, TRIED_BEHIND:]

    def error(pieces: list[int]) -> float:
        cache, begun, found = DynamicCache(config=model.config), 0, []
        for piece in tokens.split(pieces, dim=1):
            found.append(model(input_ids=piece, **behind(model, cache, begun, piece)).logits)
            begun += piece.shape[1]
        return (torch.cat(found[1:], 1) - wanted).abs().max().item() / wanted.abs().max().item()

    rounding = max(error([TRIED_BEHIND, *[1] * TRIED]), torch.finfo(torch.float32).eps)
    return error([TRIED_BEHIND, TRIED]) < 8 * rounding < 1e-3


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


def stored_bytes(cache: DynamicCache) -> int:
    """What all layers of a cache hold."""
    return sum(part.nbytes for layer in cache.layers for part in _tensors(vars(layer)))


def _tensors(held: Any) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    if not isinstance(held, dict):
        return []
    return [part for name, one in held.items() if not str(name).startswith("_") for part in _tensors(one)]


def _by_position(cache: DynamicCache) -> bool:
    return all(type(layer) in BY_POSITION for layer in cache.layers)

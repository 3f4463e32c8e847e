"""What a model keeps of the text that it has read, and what follows for reading several texts at once.

Attention keeps a key and a value for each position: texts of different lengths are read together with padding
that a mask hides, and a shared prefix is read once. Convolutions, linear attention and Mamba keep a state
that every token changes, padding too. Whether transformers reads several tokens behind such a state differs
from model to model, and is tried.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from bitassay.models.positions import padded_positions
from bitassay.models.walk import decoder_layers, decoder_of

# Exactly these: what a model derives from them keeps more than keys and values.
BY_POSITION = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
TRIED, TRIED_BEHIND = 8, 40  # tokens that are tried behind so many others
_trials: "WeakKeyDictionary[nn.Module, _Trial]" = WeakKeyDictionary()
_takes_positions: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes(model: nn.Module, *names: str) -> bool:
    """Return whether a model's forward has arguments of these names."""
    return set(names) <= inspect.signature(model.forward).parameters.keys()


def takes_positions(model: nn.Module) -> bool:
    """Return whether a model can be told positions that are counted from 0."""
    if model not in _takes_positions:
        _takes_positions[model] = takes(model, "position_ids") and padded_positions(model) is None
    return _takes_positions[model]


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether a model reads on from transformers' DynamicCache; others read from the beginning."""
    supported: bool = type(model)._supports_default_dynamic_cache()  # type: ignore[operator]
    by_name = supported and _argument(model) is not None
    return by_name and (_needs_no_trial(model) or _trial(model).one_by_one)


def _argument(model: nn.Module) -> str | None:
    """The name under which a cache goes to a forward."""
    return next((name for name in ("past_key_values", "cache_params") if takes(model, name)), None)


def behind(model: nn.Module, cache: DynamicCache, begun: int, tokens: torch.Tensor) -> dict[str, Any]:
    """Return the options of a forward that reads `tokens` behind the `begun` tokens of each row that
    are in the cache; with positions where it takes them, since not every model counts what it caches."""
    options: dict[str, Any] = {"use_cache": True, str(_argument(model)): cache}
    if takes_positions(model):
        positions = torch.arange(begun, begun + tokens.shape[1], device=tokens.device)
        options["position_ids"] = positions.expand(tokens.shape)
    return options


def last_positions(count: int, device: torch.device) -> Int[Tensor, " count"]:
    """Return what a forward's `logits_to_keep` takes for its last `count` positions, which must be there.
    Indices, not a number: of a number transformers takes a slice, of which torch copies the head's whole
    weight, once for each sequence of the batch."""
    return torch.arange(-count, 0, device=device)


def last_logits(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Return the options of a forward that wants its last `count` logits. All come where the model cannot say
    fewer, or then leaves positions out of its layers too (Gemma 4, behind those that hand on keys)."""
    if not takes(model, "logits_to_keep") or takes(decoder_of(model), "logits_to_keep"):
        return {}
    return {"logits_to_keep": last_positions(count, model.device)}


def keeps_positions(model: PreTrainedModel) -> bool:
    """Return whether all that a model keeps has a place for each position: then padding does no harm."""
    padded = takes(model, "past_key_values", "attention_mask") and takes_positions(model)
    by_position = padded and takes_cache(model) and _by_position(DynamicCache(config=model.config))
    return by_position and (_needs_no_trial(model) or _trial(model).padded)


def reads_on(model: PreTrainedModel) -> bool:
    """Return whether a model reads several tokens behind a cache as it reads them in one text. Of plain
    attention that is known. Of anything else it is tried: read together, tokens must be as near to those of
    one text as they are one by one. In few bits such a difference would not be seen, so there keys and values
    are taken for granted, and the answer for other states is no."""
    if not takes_cache(model):
        return False
    if _needs_no_trial(model):
        return _by_position(DynamicCache(config=model.config))
    return _trial(model).together


class _Trial(NamedTuple):
    """Whether tokens behind a cache, one or several at a time, and behind padding are read as in one text."""

    one_by_one: bool
    together: bool
    padded: bool


def _needs_no_trial(model: PreTrainedModel) -> bool:
    """Whether every layer has attention of full length under its usual name; or no trial would tell."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    named = takes_positions(model) and all(hasattr(layer, "self_attn") for layer in decoder_layers(model))
    return (plain and named) or model.dtype != torch.float32 or model.device.type == "meta"


@torch.inference_mode()
def _trial(model: PreTrainedModel) -> _Trial:
    if model in _trials:
        return _trials[model]
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = (7 * torch.arange(TRIED_BEHIND + TRIED) + 3)[None].to(model.device) % size
    wanted = model(input_ids=tokens, use_cache=False).logits
    padded = torch.cat([torch.zeros_like(tokens[:, :TRIED]), tokens], 1)
    mask = torch.cat([torch.zeros_like(tokens[:, :TRIED]), torch.ones_like(tokens)], 1)

    def error(row: Tensor, pieces: list[int], mask: Tensor | None = None) -> float:
        """The largest error of the logits behind the first piece (all, of a padded row), relative."""
        cache, begun, logits = DynamicCache(config=model.config), 0, []
        try:
            for piece in row.split(pieces, dim=1):
                options, end = behind(model, cache, begun, piece), begun + piece.shape[1]
                if mask is not None:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    options |= {"attention_mask": mask[:, :end], "position_ids": positions[:, begun:end]}
                logits.append(model(input_ids=piece, **options).logits)
                begun = end
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
            return float("inf")  # what a class does not provide for fails in any of these ways
        read = torch.cat(logits[1:], 1) if mask is None else torch.cat(logits, 1)[:, TRIED:]
        expected = wanted[:, -read.shape[1] :]
        return (read - expected).abs().max().item() / expected.abs().max().item()

    rounding = max(error(tokens, [TRIED_BEHIND, *[1] * TRIED]), torch.finfo(torch.float32).eps)
    together = error(tokens, [TRIED_BEHIND, TRIED])
    behind_padding = error(padded, [padded.shape[1] - 1, 1], mask)
    _trials[model] = _Trial(rounding < 1e-3, together < 8 * rounding < 1e-3, behind_padding < 1e-3)
    return _trials[model]


def copy_rows(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> DynamicCache:
    """Return a cache whose rows are these rows of `cache`, which stays as it is."""
    if _by_position(cache):
        copied = copy.copy(cache)  # selecting makes new tensors
        copied.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        copied = copy.deepcopy(cache)  # states are changed in place
    select_rows(copied, rows, device)
    return copied


def select_rows(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> None:
    """Leave these rows in a cache."""
    indices = torch.tensor(rows, device=device)
    if _by_position(cache):
        cache.batch_select_indices(indices)
    else:
        cache.reorder_cache(indices)  # type: ignore[arg-type] # states have it too


def stored_bytes(cache: DynamicCache) -> int:
    """Return how many bytes all layers of a cache hold."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.items() if isinstance(value, dict) else ()
    return [tensor for name, item in items if not str(name).startswith("_") for tensor in _tensors(item)]


def _by_position(cache: DynamicCache) -> bool:
    return all(type(layer) in BY_POSITION for layer in cache.layers)

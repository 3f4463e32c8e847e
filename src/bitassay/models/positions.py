"""How many tokens a model reads, and which lengths it reads alike.

A rotary key is turned by its position times a frequency. Two schemes of transformers (`modeling_rope_utils`)
choose the frequencies of a whole forward by its largest position:

    longrope  one set up to `original_max_position_embeddings` tokens, another beyond (Phi-3, Phi-4)
    dynamic   NTK scaling: beyond `max_position_embeddings` tokens, another set for every length

Keys that were cached at one length are wrong at a length with other frequencies. So whoever keeps a cache, or
reads sequences of several lengths together, asks `frequencies`, and reads again where they differ.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.models.config import read_config
from bitassay.models.identity import tokenizer

LONG = ("longrope", "su")  # su: its name in Phi-3's first checkpoints


def frequencies(model: PreTrainedModel, tokens: int) -> tuple[int, ...]:
    """Return a key of the frequencies at which a sequence of so many tokens is read: two lengths with equal
    keys are read alike. It never decreases with the length, so lengths between equal ones are equal."""
    config, keys = model.config.get_text_config(), []
    for scheme in _schemes(config):
        key = max(tokens, config.max_position_embeddings) if "dynamic" in _kind(scheme) else 0
        if _kind(scheme) in LONG:
            original = getattr(config, "original_max_position_embeddings", None)
            original = scheme.get("original_max_position_embeddings") or original
            key = int(tokens > (original or config.max_position_embeddings))
        keys.append(key)
    return tuple(keys)


def _kind(scheme: dict[str, Any]) -> str:
    return scheme.get("rope_type") or scheme.get("type") or "default"


def _schemes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """What the configuration says about its rotary embeddings: once, or for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [scheme for scheme in parameters.values() if isinstance(scheme, dict)] or [parameters]


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many positions the model was made for; None where its configuration does not say."""
    table = padded_positions(model)
    if table is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    return positions_of(model.config)


def padded_positions(model: nn.Module) -> nn.Embedding | None:
    """Return the table of learned positions counted from behind the padding's id (RoBERTa's), or None."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module if module.padding_idx is not None else None
    return None


def positions_of(config: PretrainedConfig) -> int | None:
    """Return `context_length` by the configuration alone; dynamic scaling makes `factor` times as many."""
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(count, int) or count < 1:  # XLNet says -1
        return None
    factors = [s.get("factor") or 1.0 for s in _schemes(text) if "dynamic" in _kind(s)]
    return int(count * min(factors, default=1.0))


def check_window(positions: int | None, tokens: int, what: str) -> None:
    """Raise BitassayError for windows of more tokens than the model has positions; `what` names them."""
    if positions is not None and tokens > positions:
        raise BitassayError(
            f"{what}: windows of {tokens} tokens, and the model reads {positions}",
            f"--window {positions}, or less",
        )


def model_windows(model: PreTrainedModel, protocol: Protocol) -> tuple[Int[Tensor, "windows tokens"], str]:
    """Return `token_windows` of the model's tokenizer. Raises BitassayError for too long windows."""
    check_window(context_length(model), protocol.window_tokens, protocol.id)
    return token_windows(tokenizer(model), protocol)


def check_folder(folder: Path, protocol: Protocol, *, trust_remote_code: bool = False) -> None:
    """Raise BitassayError where a protocol's windows are too long for a model that is not loaded yet."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_window(positions_of(config), protocol.window_tokens, protocol.id)


def forget_lengths(model: PreTrainedModel) -> None:
    """Make dynamic frequencies a function of the forward alone: transformers keeps those of the longest
    sequence that it has read, so that what a model says would depend on what it was asked before."""
    for module in model.modules():
        if any("dynamic" in kind for kind in _kinds(module).values()):
            module.register_forward_pre_hook(_forget)


def _forget(module: nn.Module, _arguments: object) -> None:
    for prefix, kind in _kinds(module).items():
        if "dynamic" in kind:
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _kinds(module: nn.Module) -> dict[str, str]:
    """The schemes of a rotary module of transformers by the prefix of their buffers; of others, none."""
    kinds = getattr(module, "rope_type", None) if hasattr(module, "original_max_seq_len") else None
    if isinstance(kinds, dict):
        return {f"{layer_type}_": kind for layer_type, kind in kinds.items()}
    return {"": kinds} if isinstance(kinds, str) else {}

"""What a GGUF file says of a model's configuration, and whether that is all there is to say.

The keys are read again as a reader of the file would (`gguf_model.py`), and every field of the configuration
that changes what is computed must come back. So a model that llama.cpp would run as another one is refused,
whatever the reason: an activation, a multiplier or a window that the architecture does not have.

Stretched rotary embeddings are keys (linear, YaRN) or, of Llama 3's scheme, the tensor `rope_freqs.weight`,
which llama.cpp reads for llama alone. Windows are written for Gemma, whose graphs have them.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from transformers import PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.gguf_families import FAMILIES, FIELDS, family_of
from bitassay.models.gguf_model import LOCAL_BASE, PATTERN, WINDOW, read_config
from bitassay.models.gguf_rope import FREQUENCIES, llama3_divisors

LLAMA = gguf.MODEL_ARCH.LLAMA
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "arcee": gguf.MODEL_ARCH.ARCEE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
}
# Keys that have the value of a field.
WRITTEN = (
    *("vocab_size", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
)
# The biases that llama.cpp loads; a file with others is one that it does not open.
_QKV = {"attn_q", "attn_k", "attn_v"}
BIASES: dict[str, set[str]] = {
    "llama": _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "qwen2": _QKV,
    "qwen3": _QKV,
}
# Keys of what products are multiplied by, or capped at, where a configuration has it.
SCALES = (
    *("embedding_scale", "residual_scale", "logit_scale", "attention.scale"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
ROTATIONS = ("default", "linear", "yarn", "llama3")
SLIDING = "sliding_attention"
# Fields that say nothing about what a model computes when it is run.
SILENT = {
    *PretrainedConfig.__dataclass_fields__,
    *("initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "max_window_layers"),
    # The tokenizer says these, and the generation configuration.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # Windows, which are refused before this, or compared by themselves.
    *("sliding_window", "use_sliding_window", "layer_types"),
}
ACTIVATIONS = {"swish": "silu"}  # other names of the same function


class _Plain(NamedTuple):
    """A tensor as a reader of a file has it."""

    data: np.ndarray
    tensor_type: Kind


def head_size(config: PretrainedConfig) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def described(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """Return the keys of a model with `layers` layers, without the architecture's prefix."""
    size, rope = head_size(config), _rotation(config)
    return {
        **{key: getattr(config, FIELDS[key][0]) for key in WRITTEN},
        "block_count": layers,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": float(rope["rope_theta"]),
        **_stretching(rope, config.max_position_embeddings),
        **_windows(config),
        **{key: float(scale) for key in SCALES if (scale := _scale(config, key))},
    }


def _scale(config: PretrainedConfig, key: str) -> float | None:
    return next((getattr(config, name) for name in FIELDS[key] if hasattr(config, name)), None)


def _rotation(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding of layers that see everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _stretching(rope: dict[str, Any], context: int) -> dict[str, Any]:
    kind, keys = rope.get("rope_type", "default"), dict[str, Any]()
    if kind in ("linear", "yarn"):
        keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(_yarn(rope, context)[_ORIGINAL])
        attention = _yarn(rope, context)["attention_factor"] / _yarn_scale(rope)
        keys |= {} if math.isclose(attention, 1.0) else {"rope.scaling.attn_factor": attention}
        betas = ("beta_fast", "beta_slow")
        keys |= {f"rope.scaling.yarn_{beta}": float(rope[beta]) for beta in betas if rope.get(beta)}
    return keys


_ORIGINAL = "original_max_position_embeddings"


def _yarn_scale(rope: dict[str, Any]) -> float:
    return 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0


def _yarn(rope: dict[str, Any], context: int) -> dict[str, Any]:
    """Return YaRN's parameters with those that transformers fills in."""
    usual = {_ORIGINAL: context, "attention_factor": _yarn_scale(rope), "beta_fast": 32.0, "beta_slow": 1.0}
    return usual | {"truncate": True} | {key: value for key, value in rope.items() if value is not None}


def _windows(config: PretrainedConfig) -> dict[str, Any]:
    """Return the keys of Gemma's windows; a pattern where it is not the usual one of the architecture."""
    kinds, period = getattr(config, "layer_types", None) or [], _family(config).window_period
    if period < 2 or SLIDING not in kinds:
        return {}
    pattern = [kind == SLIDING for kind in kinds]
    usual = [bool((layer + 1) % period) for layer in range(len(kinds))]
    keys: dict[str, Any] = {WINDOW: config.sliding_window} | ({PATTERN: pattern} if pattern != usual else {})
    local = config.rope_parameters.get(SLIDING)
    return keys if local is None else keys | {LOCAL_BASE: float(local["rope_theta"])}


def _family(config: PretrainedConfig) -> Any:
    return FAMILIES[gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]]


def is_interleaved(config: PretrainedConfig) -> bool:
    """Return whether the rows of q and k are in llama.cpp's order."""
    return _family(config).interleaved


def norm_offset(config: PretrainedConfig) -> float:
    """Return what the architecture's norm weights in a file have more than those of transformers."""
    return _family(config).norm_offset


def rope_tensors(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Return the tensors, in fp32, that stretch a rotary embedding by Llama 3's scheme; none for others."""
    rope = _rotation(config)
    if rope.get("rope_type") != "llama3":
        return {}
    size = head_size(config) // 2
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(size) / size)
    said = [rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)]
    return {FREQUENCIES: llama3_divisors(wavelengths, *said).astype(np.float32)}


def rotation_obstacle(config: PretrainedConfig) -> str | None:
    """Return why a rotary embedding is not written, None where it is."""
    rope = config.rope_parameters
    parts = list(rope.values()) if "full_attention" in rope else [rope]
    for part in parts:
        if part.get("rope_type", "default") not in ROTATIONS:
            return f"stretched rotary embeddings ({part['rope_type']}) are not written"
    if rope_tensors(config) and ARCHITECTURES[config.model_type] is not LLAMA:
        return f"llama.cpp's {config.model_type} has no rotary embeddings of Llama 3's scheme"
    local = rope.get(SLIDING, {})
    return (
        "stretched rotary embeddings of windows" if local.get("rope_type", "default") != "default" else None
    )


def window_obstacle(config: PretrainedConfig) -> str | None:
    """Return why windows are not written, None where they are or there are none."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    some = kinds or getattr(config, "sliding_window", None)
    if not some or (_family(config).window_period > 1 and kinds <= {SLIDING}):
        return None
    return "sliding windows are not written"


def check_description(model: PreTrainedModel, names: Collection[str]) -> None:
    """Refuse a model that its keys and tensors, called `names` in the file, do not describe."""
    config = model.config.get_text_config()
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    layers = config.num_hidden_layers
    keys = {f"{architecture}.{key}": value for key, value in described(config, layers).items()}
    fields = {"general.architecture": architecture, **keys}
    family = family_of(fields)
    assert family is not None
    biases = {name.split(".")[-2] for name in names if name.endswith(".bias")}
    if extra := sorted(biases - BIASES.get(architecture, set())):
        raise _refused(model, f"llama.cpp's {architecture} has no biases for {', '.join(extra)}")
    if architecture == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise _refused(
            model, f"llama.cpp's qwen2 has no heads of their own size (head_dim = {head_size(config)})"
        )
    if architecture == "olmo2" and config.tie_word_embeddings:
        raise _refused(model, "llama.cpp's olmo2 has no head that is the embedding")
    tensors = {name: _Plain(data, Kind.F32) for name, data in rope_tensors(config).items()}
    back = read_config(fields, family, {**dict.fromkeys(names), **tensors}, vocabulary=config.vocab_size)
    compared = {"layer_types"} if family.window_period > 1 else set()
    compared |= {"sliding_window"} if SLIDING in (getattr(config, "layer_types", None) or ()) else set()
    silent = SILENT - compared
    if FREQUENCIES in tensors:  # which are in the file as they are, whatever a reader makes of them
        silent |= {"rope_parameters"}
    changed = [
        f"{name} = {getattr(config, name)}"
        for name in type(config).__dataclass_fields__
        if name not in silent and not _same(name, getattr(config, name), getattr(back, name, None))
    ]
    if changed:
        raise _refused(model, f"llama.cpp's {architecture} has no {', '.join(changed)}")


def _same(name: str, ours: Any, back: Any) -> bool:
    if isinstance(ours, float) and isinstance(back, float):
        return math.isclose(ours, back, rel_tol=1e-6)  # the file holds float32
    if isinstance(ours, dict) and isinstance(back, dict):
        plain = {"partial_rotary_factor": 1.0, "rope_type": "default"} if "rope_theta" in ours else {}
        said, read = (
            plain | {key: v for key, v in fields.items() if v is not None} for fields in (ours, back)
        )
        if said.get("rope_type") == read.get("rope_type") == "yarn":
            said, read = (_yarn(fields, read[_ORIGINAL]) for fields in (said, read))
        return said.keys() == read.keys() and all(_same(key, said[key], read[key]) for key in said)
    if name == "hidden_act":
        return ACTIVATIONS.get(str(ours), ours) == back
    # What the described class does not have must be off.
    return ours == back or (back is None and not ours)


def _refused(model: PreTrainedModel, why: str) -> BitassayError:
    return BitassayError(f"{type(model).__name__} as GGUF: {why}", "save a folder: --out")

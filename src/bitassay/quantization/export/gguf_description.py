"""What a GGUF file says of a model's configuration, and whether that is all there is to say.

The keys are read again as a reader of the file would (`gguf_model.py`), and every field of the configuration
that changes what is computed must come back. So a model that llama.cpp would run as another one is refused,
whatever the reason: an activation, a multiplier or a window that the architecture does not have.
"""

import math
from collections.abc import Collection
from typing import Any

import gguf
from transformers import PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.gguf_families import FIELDS, family_of
from bitassay.models.gguf_model import read_config

LLAMA = gguf.MODEL_ARCH.LLAMA
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# Keys that have the value of a field.
WRITTEN = (
    *("vocab_size", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
)
# The biases that llama.cpp loads; a file with others is one that it does not open.
_QKV = {"attn_q", "attn_k", "attn_v"}
BIASES = {"llama": _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}, "qwen2": _QKV, "qwen3": _QKV}
# Fields that say nothing about what a model computes when it is run.
SILENT = {
    *PretrainedConfig.__dataclass_fields__,
    *("initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "max_window_layers"),
    # The tokenizer says these, and the generation configuration.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # Windows, which are refused before this.
    *("sliding_window", "use_sliding_window", "layer_types"),
}
ACTIVATIONS = {"swish": "silu"}  # other names of the same function


def head_size(config: PretrainedConfig) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def described(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """Return the keys of a model with `layers` layers, without the architecture's prefix."""
    size = head_size(config)
    return {
        **{key: getattr(config, FIELDS[key][0]) for key in WRITTEN},
        "block_count": layers,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


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
    if extra := sorted(biases - BIASES[architecture]):
        raise _refused(model, f"llama.cpp's {architecture} has no biases for {', '.join(extra)}")
    if architecture == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise _refused(
            model, f"llama.cpp's qwen2 has no heads of their own size (head_dim = {head_size(config)})"
        )
    back = read_config(fields, family, dict.fromkeys(names), vocabulary=config.vocab_size)
    changed = [
        f"{name} = {getattr(config, name)}"
        for name in type(config).__dataclass_fields__
        if name not in SILENT and not _same(name, getattr(config, name), getattr(back, name, None))
    ]
    if changed:
        raise _refused(model, f"llama.cpp's {architecture} has no {', '.join(changed)}")


def _same(name: str, ours: Any, back: Any) -> bool:
    if isinstance(ours, float) and isinstance(back, float):
        return math.isclose(ours, back, rel_tol=1e-6)  # the file holds float32
    if isinstance(ours, dict) and isinstance(back, dict):
        plain = {"partial_rotary_factor": 1.0, "rope_type": "default"} if name == "rope_parameters" else {}
        said, read = (
            plain | {key: v for key, v in fields.items() if v is not None} for fields in (ours, back)
        )
        return said.keys() == read.keys() and all(_same(key, said[key], read[key]) for key in said)
    if name == "hidden_act":
        return ACTIVATIONS.get(str(ours), ours) == back
    # What the described class does not have must be off.
    return ours == back or (back is None and not ours)


def _refused(model: PreTrainedModel, why: str) -> BitassayError:
    return BitassayError(f"{type(model).__name__} as GGUF: {why}", "save a folder: --out")

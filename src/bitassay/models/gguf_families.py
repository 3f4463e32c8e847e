"""Which architectures of GGUF are read, and what each of their keys means to transformers.

A key that changes what is computed stands in one of these tables, by the field of the configuration that
takes it up, or it has one value that changes nothing. Everything else under an architecture's prefix makes
`gguf_model.py` refuse the file. The keys and their defaults are llama.cpp's (src/llama-arch.cpp,
src/llama-model.cpp and src/models/, July 2026), the fields those of transformers' configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Keys that nearly every architecture has.
SHAPE = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}

# Keys that `gguf_model.py` reads one by one, because several make one field.
READ_APART = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "attn_factor")),
    *(f"rope.scaling.yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow")),
}
# Values that change nothing, for keys that are read no further. `...`: any, the key only describes.
HARMLESS: dict[str, Any] = {
    "tensor_data_layout": ...,
    "rope.scaling.finetuned": ...,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.alpha": 0.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.shared_kv_layers": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
}


@dataclass(frozen=True)
class Family:
    """One architecture. `keys`: what fields take keys up. `fixed`: fields that the architecture implies.
    `interleaved`: the rows of q and k are in llama.cpp's order. `norm_offset`: what llama.cpp's norm weights
    have more than transformers'. `partial_rotary`: a part of a head may stay unrotated. `windows`: how many
    layers share one that sees everything, where the file does not say which do. `switches`: fields that are
    on where a tensor of such a name is in the file."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm: Mapping[str, str] = field(default_factory=lambda: RMS)
    switches: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False
    windows: int = 0


_ATTENTION_BIAS: dict[str, str] = dict.fromkeys(
    ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"), "attention_bias"
)
_MLP_BIAS: dict[str, str] = dict.fromkeys(("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"), "mlp_bias")
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", switches=_ATTENTION_BIAS | _MLP_BIAS, fixed={"hidden_act": "silu"}, interleaved=True
    ),
    # What the file calls llama and has a window, or experts.
    "llama with a window": Family(
        "mistral",
        keys={"attention.sliding_window": "sliding_window"},
        fixed={"hidden_act": "silu"},
        interleaved=True,
    ),
    "llama with experts": Family(
        "mixtral",
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        fixed={"hidden_act": "silu", "sliding_window": None},
        interleaved=True,
    ),
    "qwen2": Family("qwen2", fixed={"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Family(
        "qwen3", switches=_ATTENTION_BIAS, fixed={"hidden_act": "silu", "use_sliding_window": False}
    ),
    "qwen2moe": Family(
        "qwen2_moe",
        keys=_EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        keys=_EXPERTS,
        switches=_ATTENTION_BIAS,
        fixed={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "phi3": Family(
        "phi3",
        keys={"attention.sliding_window": "sliding_window"},
        fixed={"hidden_act": "silu"},
        partial_rotary=True,
    ),
    "gemma": Family("gemma", fixed={"hidden_act": "gelu_pytorch_tanh"}, norm_offset=1.0),
    "gemma2": Family(
        "gemma2",
        keys={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed=_GEMMA
        | {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norm_offset=1.0,
        windows=2,
    ),
    "gemma3": Family(
        "gemma3_text",
        keys={
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed=_GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        norm_offset=1.0,
        windows=6,
    ),
    "granite": Family(
        "granite",
        keys=_MULTIPLIERS,
        switches=_ATTENTION_BIAS | _MLP_BIAS,
        fixed={"hidden_act": "silu", "embedding_multiplier": 1.0, "residual_multiplier": 1.0},
        interleaved=True,
    ),
    "smollm3": Family(
        "smollm3",
        switches=_ATTENTION_BIAS | _MLP_BIAS,
        fixed={"hidden_act": "silu", "use_sliding_window": False},
        interleaved=True,
    ),
    "arcee": Family(
        "arcee", switches=_ATTENTION_BIAS | _MLP_BIAS, fixed={"hidden_act": "relu2"}, interleaved=True
    ),
    "seed_oss": Family(
        "seed_oss",
        switches=_ATTENTION_BIAS | _MLP_BIAS | {"attn_output.bias": "attention_out_bias"},
        fixed={"hidden_act": "silu", "attention_out_bias": False},
    ),
    "olmo2": Family("olmo2", switches=_ATTENTION_BIAS, fixed={"hidden_act": "silu"}),
    "command-r": Family(
        "cohere",
        keys={"logit_scale": "logit_scale"},
        norm={"attention.layer_norm_epsilon": "layer_norm_eps"},
        switches=_ATTENTION_BIAS | {"attn_q_norm.weight": "use_qk_norm"},
        fixed={"hidden_act": "silu", "use_qk_norm": False},
    ),
    "nemotron": Family(
        "nemotron",
        norm={
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "attention.layer_norm_epsilon": "norm_eps",
        },
        switches=_ATTENTION_BIAS | _MLP_BIAS,
        fixed={"hidden_act": "relu2"},
        norm_offset=1.0,
        partial_rotary=True,
    ),
    "starcoder2": Family(
        "starcoder2",
        norm={"attention.layer_norm_epsilon": "norm_epsilon"},
        switches=dict.fromkeys((*_ATTENTION_BIAS, *_MLP_BIAS), "use_bias"),
        fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None, "use_bias": False},
    ),
    "stablelm": Family(
        "stablelm",
        keys={"use_parallel_residual": "use_parallel_residual"},
        norm={"attention.layer_norm_epsilon": "layer_norm_eps"},
        switches=dict.fromkeys(("attn_q.bias", "attn_k.bias", "attn_v.bias"), "use_qkv_bias"),
        fixed={"hidden_act": "silu", "use_qkv_bias": False},
        partial_rotary=True,
    ),
}


def family_of(fields: Mapping[str, Any]) -> Family | None:
    """The family of a file with these keys, None for one that is not read."""
    name = fields.get("general.architecture")
    if name == "llama" and fields.get("llama.expert_count"):
        name = "llama with experts"
    elif name == "llama" and fields.get("llama.attention.sliding_window"):
        name = "llama with a window"
    return FAMILIES.get(str(name))

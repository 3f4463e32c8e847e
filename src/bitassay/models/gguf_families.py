"""Which architectures of GGUF are read, and what each of their keys means to transformers.

A key that changes what is computed has a field of the configuration that takes it up (FIELDS), or is read by
`gguf_model.py` together with others, or has the one value that changes nothing. Every other key under an
architecture's prefix makes `gguf_model.py` refuse the file. What a key does not say is what the class of the
configuration says by default. The keys and their defaults are llama.cpp's (src/llama-arch.cpp,
src/llama-model.cpp and src/models/, July 2026).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The fields that may take up a key: the first one that the class of the configuration declares.
FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
# Fields that transformers works out where a class does not declare them.
DERIVED = ("head_dim", "num_key_value_heads")
# Fields that are on where a tensor of such a name is in the file; of several, those that a class declares.
SWITCHES = {
    "attention_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "use_qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "mlp_bias": ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    "use_bias": ("attn_q.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias"),
    "use_qk_norm": ("attn_q_norm.weight",),
}
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
    "attention.causal": True,
    **dict.fromkeys(
        (
            *("rope.scaling.yarn_log_multiplier", "rope.scaling.alpha", "attention.clamp_kqv"),
            *("attention.max_alibi_bias", "attention.scale", "attention.sliding_window"),
            *("attention.shared_kv_layers", "attn_logit_softcapping", "final_logit_softcapping"),
            *("logit_scale", "residual_scale", "embedding_scale", "expert_count", "expert_used_count"),
            *("nextn_predict_layers", "pooling_type"),
        ),
        0,
    ),
}


@dataclass(frozen=True)
class Family:
    """One architecture. `fixed`: fields that the architecture implies; keys for them are not read.
    `interleaved`: the rows of q and k are in llama.cpp's order. `norm_offset`: what llama.cpp's norm weights
    have more than transformers'. `partial_rotary`: a part of a head may stay unrotated. `window_period`: of
    so many layers the last sees everything, and where it is 1, all see a window; 0: windows are not read.
    `largest`: how many layers the model of the family has whose attention is scaled by another size."""

    model_type: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False
    window_period: int = 0
    largest: int = 0

    def field_of(self, key: str, declared: set[str]) -> str | None:
        """Return the field, of those that a class declares, that takes up a key; None: it is not read."""
        names = [name for name in FIELDS.get(key, ()) if name in declared or name in DERIVED]
        if not names or names[0] in self.fixed or (names[0] == "sliding_window" and not self.window_period):
            return None
        return names[0]


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True),
    # What the file calls llama and has a window, or experts.
    "llama with a window": Family("mistral", interleaved=True, window_period=1),
    "llama with experts": Family("mixtral", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2moe": Family("qwen2_moe"),
    "qwen3moe": Family("qwen3_moe", fixed={"norm_topk_prob": True}),
    "phi3": Family("phi3", partial_rotary=True, window_period=1),
    "gemma": Family("gemma", norm_offset=1.0),
    "gemma2": Family("gemma2", norm_offset=1.0, window_period=2, largest=46),
    "gemma3": Family(
        "gemma3_text", {"attn_logit_softcapping": None}, norm_offset=1.0, window_period=6, largest=62
    ),
    "granite": Family("granite", interleaved=True),
    "smollm3": Family("smollm3", interleaved=True),
    "arcee": Family("arcee", interleaved=True),
    "seed_oss": Family("seed_oss"),
    "olmo2": Family("olmo2"),
    "command-r": Family("cohere"),
    "nemotron": Family("nemotron", norm_offset=1.0, partial_rotary=True),
    "starcoder2": Family("starcoder2", fixed={"sliding_window": None}),
    "stablelm": Family("stablelm", partial_rotary=True),
}


def family_of(fields: Mapping[str, Any]) -> Family | None:
    """Return the family of a file with these keys, None for one that is not read."""
    name = fields.get("general.architecture")
    if name == "llama" and fields.get("llama.expert_count"):
        name = "llama with experts"
    elif name == "llama" and fields.get("llama.attention.sliding_window"):
        name = "llama with a window"
    return FAMILIES.get(str(name))

"""Every causal architecture of the installed transformers, tiny: `tiny_architecture`.

A configuration class names its sizes in one of a few ways (`hidden_size`, `n_embd`, `d_model`, ...). SIZES
gives each of these names a small value, and a class takes those that it has, its parts (text, vision, audio)
too; OWN has what a family needs beside them. So most architectures that transformers adds need no line here.
"""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitassay.errors import BitassayError, suggestion
from bitassay.testing.tiny import random_model

LAYERS, HEADS = 2, 4
_NAMES: dict[Any, str] = {  # of the fields that get each size
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks depth "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
    "linear_num_key_heads num_query_groups num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts",
    HEADS: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads n_mamba_heads "
    "swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads indexer_n_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num mamba_n_heads "
    "mamba_dt_rank time_step_rank",
    64: "hidden_size n_embd d_model emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size backbone_hidden_size input_embedding_size output_embedding_size "
    "pronunciation_embed_dim shape_embed_dim shape_vocab_size",
    16: "head_dim swa_head_dim dim_head attention_head_size kv_channels linear_key_head_dim index_head_dim "
    "linear_value_head_dim linear_head_dim indexer_head_dim d_head qk_nope_head_dim v_head_dim rotary_dim "
    "attention_head_dim hidden_size_per_layer_input",
    96: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff d_inner "
    "dim_ff feed_forward_size dense_intermediate_size intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank "
    "expert_ffn_hidden_size shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "kv_lora_rank prefix_dense_intermediate_size o_lora_rank router_hidden_size chunk_size mamba_chunk_size "
    "indexer_budget index_block_size mamba_d_head sliding_window window_size "
    "attention_window_size sliding_window_size local_attention attention_chunk_size keep_window_size",
    8: "mamba_d_state state_size ssm_state_size qk_rope_head_dim mamba_num_heads",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace "
    "num_dense_layers moe_layer_start_index bos_token_id",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "model_max_length vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
SIZES |= {"eos_token_id": 2, "pad_token_id": 0, "mamba_head_dim": 16, "index_topk": 128}
# Latent attention rotates a part of each head alone, and all heads have keys of their own.
LATENT = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": HEADS}
_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
_SHARED_BLOCKS = {  # one block for several layers, on the hidden state and the embedding side by side
    "num_hidden_layers": 4,
    "layers_block_type": [_LINEAR, "hybrid"] * 2,
    "num_key_value_heads": HEADS,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": [_SLIDING, _FULL] * 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
_REFORMER = {"attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]}
_TWO_KINDS = "bailing_hybrid granitemoehybrid kimi_linear qwen3_5_text qwen3_5_moe_text qwen3_next"
# What a family needs beside SIZES: mostly one layer of each of its kinds. By the configuration's model_type.
OWN: dict[str, dict[str, Any]] = {
    **{key: {"layer_types": [_LINEAR, _FULL]} for key in _TWO_KINDS.split()},
    **{key: {"layer_types": ["conv", _FULL]} for key in ("lfm2", "lfm2_moe", "lfm3")},
    **dict.fromkeys(("zamba", "zamba2"), _SHARED_BLOCKS),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v4": {"num_hidden_layers": 4},
    "dots1": {"layer_types": [_SLIDING, _FULL], "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_kv_heads": 1,
        "indexer_compress_ratio": 4,
        "layer_types": [_LINEAR, "indexed_attention"],
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": _REFORMER,
    "xlstm": {"head_dim": 16, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# What AutoModelForCausalLM lists beside them, and why it is not here.
NOT_BUILT = {
    "blt": "three models of bytes in one, with hash tables of half a million rows",
    "dbrx": "transformers' own class does not build from its own default configuration",
    "dots3_note": "its configuration fixes the sizes of single layers",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is the language model",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a head for drafts, which reads the cache of another model",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "a decoder of audio codes that is loaded from an encoder-decoder's configuration",
    ),
}


def architectures() -> list[str]:
    """Return the `model_type` of everything that AutoModelForCausalLM loads and that is built here."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT))


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a tiny model, a decoder where it could be either; else BitassayError."""
    if model_type not in CONFIG_MAPPING:
        raise BitassayError(f"unknown architecture {model_type!r}; {suggestion(model_type, architectures())}")
    config = _tiny(CONFIG_MAPPING[model_type], changes)
    if "is_decoder" in config.to_dict() and "is_decoder" not in changes:
        config.is_decoder = True
    return config


def _tiny(kind: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    large = kind()
    fields = {*large.to_dict(), *kind.attribute_map}
    small = {name: size for name, size in SIZES.items() if kind.attribute_map.get(name, name) in fields}
    if "qk_rope_head_dim" in small:
        small |= LATENT
    parts = {name: part for name, part in vars(large).items() if isinstance(part, PretrainedConfig)}
    small |= {name: _tiny(type(part), {}) for name, part in parts.items()}
    return kind(**(small | OWN.get(kind.model_type, {}) | changes))


def tiny_architecture(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a causal model with random weights (vectors too), hidden size 64 and two layers, or as many as
    show all their kinds, with stories260k's tokenizer. `changes` override fields of the configuration."""
    return random_model(tiny_config(model_type, **changes), model_type, seed, vector_noise=0.1)


def save_tiny(model_type: str, folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write `tiny_architecture` as a folder that transformers and `bitassay.load` read; returns it."""
    model = tiny_architecture(model_type, seed, **changes)
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    return Path(folder)

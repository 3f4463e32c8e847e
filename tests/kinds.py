"""Tiny models of kinds that `bitassay.testing.tiny` has none of, with weights large enough that a mistake
shows: rotary frequencies that depend on the length, hybrid caches, layers with inputs of their own."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitassay.models.identity import Identity
from bitassay.models.positions import forget_lengths
from bitassay.models.source import Source, resolve
from bitassay.testing.tiny import stories260k

DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_head": 32,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
SHORT = 64  # where longrope and dynamic change frequencies
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ROTARY = {
    "longrope": ("phi3", {"original_max_position_embeddings": SHORT, "rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"max_position_embeddings": SHORT, "rope_parameters": DYNAMIC}),
}
HYBRID = {
    "lfm2": ("lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "qwen3_next": ("qwen3_next", MIXED | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "jamba": (
        "jamba",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "bamba": ("bamba", MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32},
    ),
}
_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "sliding_window": 32}
OWN_INPUTS = {
    "gemma4": ("gemma4_text", _LAYERS | _PER_LAYER | {"num_kv_shared_layers": 0, "global_head_dim": 16}),
    "gemma4 that shares keys": (
        "gemma4_text",
        _LAYERS | _PER_LAYER | {"num_kv_shared_layers": 2, "global_head_dim": 16},
    ),
    "gemma3n": (
        "gemma3n_text",
        _LAYERS | _PER_LAYER | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    ),
}
KINDS = ROTARY | HYBRID | OWN_INPUTS


def tiny_kind(name, **changes):
    """The model of that name, with the tokenizer of stories260k."""
    kind, own = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(DENSE | own | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.08)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    forget_lengths(model)
    model.tokenizer = stories260k().tokenizer
    model.identity = Identity(Source(f"tiny-{name}", resolve("stories260k").folder, "random weights"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def reread_greedy(model, prompt, count):
    """Greedy tokens, the whole text read again for each, and the logits that chose them."""
    text, rows = list(prompt), []
    for _ in range(count):
        rows.append(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1])
        text.append(int(rows[-1].argmax()))
    return text[len(prompt) :], torch.stack(rows)


def hook_count(model):
    """Hooks, and forwards that are not the class's."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in module.__dict__)
        for module in model.modules()
    )

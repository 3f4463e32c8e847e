"""Tiny models for tests: seeded random weights in the real architectures, and one that was really trained.

They are part of the package so that users can test their own code without a download.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitassay.errors import BitassayError, suggestion
from bitassay.models.identity import Identity
from bitassay.models.load import load_checkpoint
from bitassay.models.options import LoadOptions, as_dtype
from bitassay.models.source import Source, resolve

_DENSE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": 64}),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    # the only one here whose experts are [in, out] and have biases
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _PLAIN_ROPE},
    ),
}


def stories260k(dtype: str | torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the trained Llama of 260 thousand parameters that this package carries."""
    return load_checkpoint(resolve("stories260k"), LoadOptions(as_dtype(dtype)))


def tiny_model(architecture: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A randomly initialised model of `architecture` with hidden size 96 (no power of two) and three layers.

    It uses stories260k's tokenizer. `changes` override fields of the configuration.
    """
    if architecture not in ARCHITECTURES:
        raise BitassayError(
            f"unknown architecture {architecture!r}; {suggestion(architecture, ARCHITECTURES)}"
        )
    model_type, extra = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **(_DENSE | extra | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    from transformers import AutoTokenizer

    stories = resolve("stories260k")
    model.tokenizer = AutoTokenizer.from_pretrained(stories.folder)
    model.identity = Identity(Source(f"tiny-{architecture}", stories.folder, f"random weights, seed {seed}"))
    return model.eval().requires_grad_(False)

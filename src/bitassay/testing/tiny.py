"""Tiny models for tests: seeded random weights in the real architectures, and one that was really trained.

They are part of the package so that users can test their own code without a download.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError, suggestion
from bitassay.models.identity import Identity, attach
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
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": 64}),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "mixtral": ("mixtral", _EXPERTS | {"sliding_window": None}),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    # The only one here whose experts are [in, out] and have biases.
    "gpt_oss": ("gpt_oss", _EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
}


def stories260k(dtype: str | torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the trained Llama of 260 thousand parameters that this package carries."""
    return load_checkpoint(resolve("stories260k"), LoadOptions(as_dtype(dtype)))


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a model with random weights, hidden size 96 (no power of two), three layers and stories260k's
    tokenizer. `changes` override fields of the configuration."""
    if architecture not in ARCHITECTURES:
        raise BitassayError(
            f"unknown architecture {architecture!r}; {suggestion(architecture, ARCHITECTURES)}"
        )
    model_type, extra = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **(_DENSE | extra | changes))
    return random_model(config, architecture, seed)


def random_model(
    config: PretrainedConfig, name: str, seed: int, vector_noise: float = 0.0
) -> PreTrainedModel:
    """Return a model with seeded random weights, and stories260k's tokenizer. vector_noise: what is added to
    gains and biases, whose zeros and ones hide what is left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if vector_noise and parameter.ndim == 1:
                parameter.data += vector_noise * torch.randn_like(parameter)
    stories = resolve("stories260k")
    known = Identity(Source(f"tiny-{name}", stories.folder, f"random weights, seed {seed}"))
    attach(model, tokenizer=AutoTokenizer.from_pretrained(stories.folder), identity=known)
    return model.eval().requires_grad_(False)

"""Checkpoints to break: a copy of the tiny trained model that a test may change, and the same weights as a
GGUF file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

from bitassay.models.source import resolve

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """stories260k as a folder of its own."""
    copy = tmp_path / "model"
    shutil.copytree(resolve("stories260k").folder, copy)
    return copy


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """stories260k's weights as fp32 GGUF: llama.cpp's names, and its order of the rotary halves in q and k.
    The tokenizer is a byte-level one of the same size, the kind that most GGUF files carry."""
    source = resolve("stories260k").folder
    config = json.loads((source / "config.json").read_text())
    letters = sorted(ByteLevel.alphabet())
    pairs = [("a", letter) for letter in letters][: config["vocab_size"] - 3 - len(letters)]
    weights = load_file(source / "model.safetensors")
    path = tmp_path / "stories.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, *map("".join, pairs)])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {
        "token_embd": weights["model.embed_tokens.weight"],
        "output_norm": weights["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in BLOCK.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                split = weight.reshape(heads[theirs], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
            tensors[f"blk.{layer}.{theirs}"] = weight
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

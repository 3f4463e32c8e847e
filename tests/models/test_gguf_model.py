"""A GGUF file is read as the model that it describes, whole, or refused by the name of what is not read."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from bitassay.errors import BitassayError
from bitassay.models.gguf_families import FAMILIES
from bitassay.models.gguf_model import read_model, sources_of

VOCABULARY = 64
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(1))
TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(3, VOCABULARY))],
    "tokenizer.ggml.scores": [0.0] * VOCABULARY,
    "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (VOCABULARY - 3)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
KEYS = {
    "context_length": 128,
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "rope.freq_base": 10000.0,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NORM = {"attention.layer_norm_epsilon": 1e-5}
# What llama.cpp's converters do (conversion/*.py: classes with `undo_permute`; norms that get `+ 1`).
INTERLEAVED = {"llama", "granite", "smollm3", "arcee"}
MORE_BY_ONE = {"gemma", "gemma2", "gemma3", "nemotron"}


def model_of(kind, **changes):
    """A model of this kind with random weights, biases and norms."""
    norms = {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "norm_epsilon": 1e-5, "norm_eps": 1e-5}
    given = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | SHAPE | norms | changes
    if kind in ("nemotron", "stablelm"):  # which take it for a field of their own
        given["rope_parameters"]["partial_rotary_factor"] = changes.get("partial_rotary_factor", 1.0)
    config = AutoConfig.for_model(kind, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write(path: Path, architecture, model, keys, tensors=None) -> Path:
    """A file as llama.cpp's converter would write it: its names, its order of rows, its norms."""
    written = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = value.numpy()
        sources = sources_of(name, architecture, model.config.num_hidden_layers)
        for source, part in zip(sources, np.split(value, len(sources), axis=-2) if len(sources) > 1 else [value], strict=True):  # fmt: skip
            if architecture in INTERLEAVED and source.split(".")[-2] in ("attn_q", "attn_k"):
                size = model.config.head_dim
                rows = [h * size + j * size // 2 + i for h in range(len(part) // size) for i in range(size // 2) for j in (0, 1)]  # fmt: skip
                part = part[rows]
            if source.endswith("norm.weight"):
                part = part + np.float32(architecture in MORE_BY_ONE)
            written[source] = np.ascontiguousarray(part)
    writer = GGUFWriter(path, architecture)
    for key, value in {**{f"{architecture}.{k}": v for k, v in keys.items()}, **TOKENIZER}.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, value in {**written, **(tensors or {})}.items():
        if value is not None:
            writer.add_tensor(name, value, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(IDS).logits


FAMILIES_READ = {
    "llama": ("llama", "llama", {}, {}),
    "llama, tied": ("llama", "llama", {"tie_word_embeddings": True}, {}),
    "llama, biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, wide heads": (
        "llama",
        "llama",
        {"head_dim": 16},
        {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16},
    ),
    "llama, window": ("llama", "mistral", {"sliding_window": 16}, {"attention.sliding_window": 16}),
    "llama, experts": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, EXPERTS),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", {}, {}),
    "qwen3, biases": ("qwen3", "qwen3", {"attention_bias": True}, {}),
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        FEW | {"shared_expert_intermediate_size": 24},
        EXPERTS | {"expert_feed_forward_length": 16, "expert_shared_feed_forward_length": 24},
    ),
    "qwen3moe": ("qwen3moe", "qwen3_moe", FEW | {"norm_topk_prob": True}, EXPERTS | {"expert_feed_forward_length": 16}),
    "gemma": ("gemma", "gemma", {"tie_word_embeddings": True}, {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
        {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"attention.sliding_window": 16, "block_count": 7, "rope.freq_base": 1e6, "rope.scaling.factor": 4.0},
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"attention.sliding_window": 0, "rope.dimension_count": 4},
    ),
    "granite": (
        "granite",
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
        {"embedding_scale": 3.0, "logit_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.2},
    ),
    "smollm3": ("smollm3", "smollm3", {}, {}),
    "arcee": ("arcee", "arcee", {}, {}),
    "seed_oss": ("seed_oss", "seed_oss", {"attention_bias": True}, {}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "command-r": ("command-r", "cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}, NORM | {"logit_scale": 0.25}),
    "nemotron": ("nemotron", "nemotron", {"partial_rotary_factor": 0.5}, NORM | {"rope.dimension_count": 4}),
    "starcoder2": ("starcoder2", "starcoder2", {"use_bias": True}, NORM),
    "stablelm": (
        "stablelm",
        "stablelm",
        {"partial_rotary_factor": 0.5},
        NORM | {"rope.dimension_count": 4, "use_parallel_residual": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES_READ)
def test_families_are_read_whole(tmp_path, name):
    architecture, kind, changes, keys = FAMILIES_READ[name]
    base = model_of(kind, **changes)
    if NORM.items() <= keys.items():
        keys = {"attention.layer_norm_rms_epsilon": None} | keys
    keys = KEYS | keys
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", architecture, base, keys)))
    assert type(again) is type(base)
    torch.testing.assert_close(logits(again), logits(base), rtol=0, atol=1e-5)


def test_every_family_is_tried():
    assert {row[0] for row in FAMILIES_READ.values()} == {name for name in FAMILIES if " " not in name}
    kinds = {row[1] for row in FAMILIES_READ.values()}
    assert kinds == {family.model_type for family in FAMILIES.values()}


def _llama3(factor, low, high, original, theta=1e4):
    """Llama 3's divisors by transformers' own code."""
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
    }
    stretched = model_of("llama", rope_parameters=rope)
    plain = model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
    divisors = plain.model.rotary_emb.inv_freq / stretched.model.rotary_emb.inv_freq
    return stretched, {"rope_freqs.weight": divisors.numpy()}


SCALING = "rope.scaling."
STRETCHED = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "no type": ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "type none": ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "yarn, betas": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "yarn, attention": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5 * (0.1 * math.log(4) + 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_stretched_rotary_embeddings(tmp_path, name, kind):
    keys, rope = STRETCHED[name]
    right, plain = (model_of(kind, rope_parameters={"rope_theta": 1e4} | more) for more in (rope, {}))
    path = write(tmp_path / "m.gguf", kind, plain, KEYS | {f"{SCALING}{key}": v for key, v in keys.items()})
    again = read_model(GGUFReader(path))
    torch.testing.assert_close(logits(again), logits(right), rtol=0, atol=1e-5)
    if rope["rope_type"] != "default":
        assert (logits(right) - logits(plain)).abs().max() > 0.01


@pytest.mark.parametrize("given", [
    (8.0, 1.0, 4.0, 64),
    (32.0, 1.0, 4.0, 8192),
    (5.0, 1.5, 6.0, 48),
])  # fmt: skip
def test_frequencies_divided_as_llama_3(tmp_path, given):
    right, tensors = _llama3(*given)
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", right, KEYS, tensors)))
    torch.testing.assert_close(logits(again), logits(right), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        again.model.rotary_emb.inv_freq, right.model.rotary_emb.inv_freq, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("high", "original"), [(4.0, 8192), (6.0, 4000)])
def test_parameters_of_llama_3_are_found_again(tmp_path, high, original):
    base = model_of("llama", head_dim=64)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": original, "rope_theta": 500000.0}  # fmt: skip
    right = model_of("llama", head_dim=64, rope_parameters=rope)
    plain = model_of("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    tensors = {
        "rope_freqs.weight": (plain.model.rotary_emb.inv_freq / right.model.rotary_emb.inv_freq).numpy()
    }
    keys = KEYS | {"attention.key_length": 64, "attention.value_length": 64, "rope.freq_base": 500000.0}
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", base, keys, tensors)))
    assert again.config.rope_parameters == rope


def test_frequencies_divided_by_anything(tmp_path):
    base = model_of("llama")
    factors = np.array([1.0, 3.0, 2.0, 7.0], np.float32)
    again = read_model(
        GGUFReader(write(tmp_path / "m.gguf", "llama", base, KEYS, {"rope_freqs.weight": factors}))
    )
    torch.testing.assert_close(
        again.model.rotary_emb.inv_freq * torch.from_numpy(factors), base.model.rotary_emb.inv_freq
    )
    right = model_of("llama")
    right.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    torch.testing.assert_close(logits(again), logits(right), rtol=0, atol=1e-5)


def test_longrope(tmp_path):
    short, long = ([1.0, 1.5, 2.0, 2.5], [2.0, 4.0, 6.0, 8.0])
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.2}  # fmt: skip
    right = model_of("llama", rope_parameters=rope)
    tensors = {
        "rope_factors_short.weight": np.array(short, np.float32),
        "rope_factors_long.weight": np.array(long, np.float32),
    }
    keys = KEYS | {
        f"{SCALING}type": "longrope",
        f"{SCALING}attn_factor": 1.2,
        f"{SCALING}original_context_length": 32,
    }
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", right, keys, tensors)))
    for length in (20, 100):
        with torch.inference_mode():
            ours, theirs = (model(IDS[:, :length]).logits for model in (again, right))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_biases_of_some_projections(tmp_path):
    """Files converted from InternLM have them at q, k and v, or without one at the output."""
    base = model_of("llama", attention_bias=True)
    for layer in base.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    without = {f"blk.{layer}.attn_output.bias": None for layer in range(3)}
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", base, KEYS, without)))
    torch.testing.assert_close(logits(again), logits(base), rtol=0, atol=1e-5)


def test_generation_ends_where_llama_cpp_ends_it(tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZER, "tokenizer.ggml.eot_token_id", 7)
    monkeypatch.setitem(TOKENIZER, "tokenizer.ggml.eom_token_id", 2)
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", model_of("llama"), KEYS)))
    assert again.generation_config.eos_token_id == [2, 7]
    assert again.config.eos_token_id == 2


@pytest.mark.parametrize(("keys", "tensors", "named"), [
    ({"attention.scale": 0.3}, {}, r"llama\.attention\.scale = 0\.3"),
    ({"logit_scale": 2.0}, {}, r"llama\.logit_scale = 2\.0"),
    ({"residual_scale": 2.0, "embedding_scale": 3.0}, {}, r"residual_scale = 2\.0, llama\.embedding_scale = 3\.0"),
    ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
    ({"attention.clamp_kqv": 8.0}, {}, r"attention\.clamp_kqv = 8\.0"),
    ({"attention.causal": False}, {}, r"attention\.causal = False"),
    ({"attention.never_heard_of": 1}, {}, r"attention\.never_heard_of = 1"),
    ({"hidden_activation": "relu"}, {}, "hidden_activation = relu"),
    ({"rope.dimension_count": 4}, {}, r"rope\.dimension_count = 4"),
    ({"attention.value_length": 16}, {}, "value_length = 16"),
    ({"attention.head_count_kv": [2, 1, 2]}, {}, "layers that differ"),
    ({"nextn_predict_layers": 1}, {}, "nextn_predict_layers = 1"),
    ({"attention.head_count": None}, {}, r"llama\.attention\.head_count: missing"),
    ({f"{SCALING}type": "spiral", f"{SCALING}factor": 2.0}, {}, "spiral"),
    ({f"{SCALING}type": "longrope"}, {}, "rope_factors_short"),
    ({f"{SCALING}type": "linear", f"{SCALING}factor": 2.0, f"{SCALING}attn_factor": 1.5}, {}, "attn_factor = 1.5"),
    ({f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}yarn_attn_factor": 1.5}, {}, "yarn_attn_factor"),
    ({f"{SCALING}yarn_ext_factor": 0.5}, {}, "yarn_ext_factor"),
    ({f"{SCALING}yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
    ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, "5 factors"),
    ({}, {"rope_factors_long.weight": np.ones(4, np.float32)}, "only one is there"),
    ({}, {"blk.1.attn_q_norm.weight": np.ones(8, np.float32)}, r"no place for: blk\.1\.attn_q_norm\.weight"),
    ({}, {"blk.3.attn_q.weight": np.ones((32, 32), np.float32)}, r"no place for: blk\.3\.attn_q"),
    ({}, {"output.bias": np.ones(64, np.float32)}, r"no place for: output\.bias"),
    ({}, {"blk.2.ffn_up.weight": None}, r"the file has not: blk\.2\.ffn_up\.weight"),
    ({}, {"output_norm.weight": None}, r"the file has not: output_norm\.weight"),
    ({"feed_forward_length": 40}, {}, r"ffn_gate\.weight: of shape \(48, 32\)"),
    ({"block_count": 2}, {}, r"no place for: blk\.2\."),
    ({"vocab_size": 64, "expert_count": 4, "expert_used_count": 2}, {}, "the file has not"),
])  # fmt: skip
def test_what_is_not_read_is_refused_by_name(tmp_path, keys, tensors, named):
    path = write(tmp_path / "m.gguf", "llama", model_of("llama"), KEYS | keys, tensors)
    with pytest.raises(BitassayError, match=named):
        read_model(GGUFReader(path))


def test_values_that_change_nothing_are_no_hindrance(tmp_path):
    base = model_of("llama")
    keys = KEYS | {
        "rope.scaling.finetuned": True,
        "attention.head_count_kv": [2, 2, 2],
        "tensor_data_layout": "Meta AI original pth",
        "attention.clamp_kqv": 0.0,
        "expert_count": 0,
        "attention.causal": True,
    }
    again = read_model(GGUFReader(write(tmp_path / "m.gguf", "llama", base, keys)))
    assert torch.equal(logits(again), logits(base))


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BitassayError, match=r"general\.architecture = rwkv7: not read, only llama"):
        read_model(GGUFReader(path))

"""Every family that is written as GGUF comes back as the same model, here and in llama.cpp."""

from importlib.util import find_spec

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig

from bitassay.engines.engine import engine_of
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.quantization.export.gguf_description import ARCHITECTURES
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.testing.tiny import random_model
from kinds import DENSE

SIZES = DENSE | {"initializer_range": 0.2, "pad_token_id": 2}
ROPE = "rope_parameters"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
# What is added to a family's usual configuration, and what of it is taken away to see that it matters.
CASES = {
    "llama3": ("llama", {ROPE: LLAMA3}, {ROPE: {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3-own": ("llama", {ROPE: LLAMA3 | {"low_freq_factor": 2.0}}, {ROPE: LLAMA3}),
    "linear": ("qwen3", {ROPE: LINEAR}, {ROPE: PLAIN}),
    "yarn": ("qwen2", {ROPE: YARN}, {ROPE: PLAIN}),
    "yarn-own": ("llama", {ROPE: YARN | {"attention_factor": 1.5, "beta_fast": 8.0}}, {ROPE: YARN}),
    "gemma": ("gemma", {}, {"hidden_act": "silu"}),
    "gemma2": ("gemma2", GEMMA, {"sliding_window": 512}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, {"sliding_window": 512}),
    "gemma3-own": (
        "gemma3_text",
        GEMMA
        | {"layer_types": ["full_attention", "sliding_attention"]}
        | {ROPE: {"full_attention": LINEAR, "sliding_attention": PLAIN | {"rope_theta": 5e3}}},
        {ROPE: {"full_attention": PLAIN, "sliding_attention": PLAIN}},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
        | {"logits_scaling": 4.0},
        {"attention_multiplier": 1.0},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, {"no_rope_layer_interval": 2}),
    "arcee": ("arcee", {}, {"hidden_act": "silu"}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}, {ROPE: PLAIN | {"rope_theta": 100.0}}),
}
TOKENS = [(i * 37) % 500 + 3 for i in range(100)]


def build(family, changes):
    return random_model(AutoConfig.for_model(family, **(SIZES | changes)), family, 1, vector_noise=0.1)


def logits(model):
    with torch.inference_mode():
        return engine_of(model).prefill([TOKENS[:20]], [TOKENS[20:]])[0].logits.float()


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=CASES)
def written(request, tmp_path, monkeypatch):
    """A model, the file of it, and the same weights under a configuration without what the case is about."""
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    family, changes, other = CASES[request.param]
    base, without = build(family, changes), build(family, changes | other)
    write_gguf(base, tmp_path / "model.gguf", embeddings="F32")
    return base, tmp_path / "model.gguf", without


def test_what_is_written_is_read_as_the_same_model(written):
    base, path, without = written
    wanted = logits(base)
    assert relative(logits(load(path)), wanted) < 5e-3  # matrices in fp16
    without.load_state_dict(base.state_dict())
    assert relative(logits(without), wanted) > 5e-2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_runs_it_as_the_same_model(written):
    base, path, _ = written
    assert relative(logits(load(path, engine="llama.cpp")), logits(base)) < 1e-2


def test_every_family_has_a_case():
    assert {family for family, _, _ in CASES.values()} | {"mistral"} == set(ARCHITECTURES)


def test_a_window_pattern_is_said_where_it_is_not_the_usual_one(tmp_path):
    for name in ("gemma3", "gemma3-own"):
        family, changes, _ = CASES[name]
        write_gguf(build(family, changes), tmp_path / f"{name}.gguf")
    usual, own = (GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("gemma3", "gemma3-own"))
    key = "gemma3.attention.sliding_window_pattern"
    assert key not in usual
    assert own[key].contents() == [False, True]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {ROPE: LLAMA3}, "qwen3 has no rotary embeddings of Llama 3's scheme"),
        ("llama", {ROPE: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "stretched .*dynamic"),
        ("llama", {ROPE: YARN | {"truncate": False}}, "rope_parameters"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma", {"tie_word_embeddings": False}, "llama.cpp knows no such tensor"),
        ("gemma", {"attention_bias": True}, "no biases for attn_k"),
        ("gemma3_text", {"hidden_activation": "silu"} | GEMMA, "hidden_activation = silu"),
        ("olmo2", {"tie_word_embeddings": True}, "olmo2 has no head that is the embedding"),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}, "no_rope_layers"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path, family, changes, message):
    with pytest.raises(BitassayError, match=message):
        write_gguf(build(family, changes), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())

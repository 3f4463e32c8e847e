"""The configuration's digest: one for each way of saying the same, another for everything that changes what
is computed."""

import dataclasses
import json
import struct

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models import config
from bitassay.models.config import configuration_digests, read_config, text_config, untie
from bitassay.models.identity import Identity, identity
from bitassay.models.source import resolve
from bitassay.testing.tiny import tiny_model


def change(folder, name="config.json", drop=(), **values):
    path = folder / name
    said = json.loads(path.read_text()) if path.is_file() else {}
    said = {key: value for key, value in said.items() if key not in drop}
    path.write_text(json.dumps(said | values))


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def spelt_as_version_4(folder):
    change(folder, drop=("rope_parameters",), rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16")


def template_in_tokenizer_config(folder):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template=TEMPLATE)


def templates_in_a_list(folder):
    (folder / "chat_template.jinja").unlink()
    said = [{"name": "default", "template": TEMPLATE}]
    change(folder, "tokenizer_config.json", chat_template=said)


def without_generation_config(folder):
    (folder / "generation_config.json").unlink()


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
SAME = {
    "names": lambda f: change(f, _name_or_path="/elsewhere", architectures=["Other"]),
    "version": lambda f: change(f, transformers_version="4.40.1"),
    "dtype": lambda f: change(f, dtype="bfloat16", use_cache=False),
    "training": lambda f: change(f, initializer_range=0.5, attention_dropout=0.1),
    "eps as float32": lambda f: change(f, rms_norm_eps=as_float32(1e-5)),
    "whole floats": lambda f: change(f, rope_parameters={"rope_theta": 10000, "rope_type": "default"}),
    "defaults left out": lambda f: change(f, drop=("head_dim", "hidden_act", "mlp_bias", "attention_bias")),
    "rope of version 4": spelt_as_version_4,
    "one end token in a list": lambda f: change(f, "generation_config.json", eos_token_id=[2]),
    "no generation_config.json": without_generation_config,
    "neutral sampling": lambda f: change(f, "generation_config.json", temperature=1.0, do_sample=False),
    "template elsewhere": template_in_tokenizer_config,
    "templates in a list": templates_in_a_list,
    "limits of the tokenizer": lambda f: change(
        f, "tokenizer_config.json", model_max_length=77, padding_side="left", name_or_path="x"
    ),
    "a slow tokenizer's name": lambda f: change(
        f, "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False, "__type": "AddedToken"}
    ),
}
OTHER = {
    "rope theta": ("model", lambda f: change(f, rope_parameters={"rope_theta": 5e4, "rope_type": "default"})),
    "rope theta of version 4": ("model", lambda f: change(f, drop=("rope_parameters",), rope_theta=5e4)),
    "rope scaling": (
        "model",
        lambda f: change(
            f, rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
        ),
    ),
    "eps": ("model", lambda f: change(f, rms_norm_eps=1e-6)),
    "activation": ("model", lambda f: change(f, hidden_act="gelu")),
    "heads": ("model", lambda f: change(f, num_attention_heads=4, num_key_value_heads=2, head_dim=16)),
    "positions": ("model", lambda f: change(f, max_position_embeddings=1024)),
    "a setting that only its own code knows": ("model", lambda f: change(f, logit_soft_cap=30.0)),
    "end token": ("generation", lambda f: change(f, "generation_config.json", eos_token_id=[2, 5])),
    "temperature": ("generation", lambda f: change(f, "generation_config.json", temperature=0.6)),
    "penalty": ("generation", lambda f: change(f, "generation_config.json", repetition_penalty=1.1)),
    "template": ("chat", lambda f: (f / "chat_template.jinja").write_text(TEMPLATE + " ")),
    "first token": ("tokenizer", lambda f: change(f, "tokenizer_config.json", add_bos_token=False)),
    "end of text": ("tokenizer", lambda f: change(f, "tokenizer_config.json", eos_token="<s>")),
}  # fmt: skip


@pytest.fixture
def chat(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize("spelling", SAME)
def test_the_same_in_other_words_is_the_same(chat, spelling):
    before = configuration_digests(chat)
    SAME[spelling](chat)
    assert configuration_digests(chat) == before


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_the_run_changes_its_part_alone(chat, name):
    part, edit = OTHER[name]
    before = configuration_digests(chat)
    edit(chat)
    after = configuration_digests(chat)
    assert {key for key in before if before[key] != after[key]} == {part}


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt_oss", "phi3", "qwen3_moe", "cohere2", "granite"])
def test_saved_and_loaded_again_is_the_same(tmp_path, kind):
    made = CONFIG_MAPPING[kind]()
    made.save_pretrained(tmp_path)
    again = read_config(tmp_path)
    assert config._fewest_settings(made) == config._fewest_settings(again)
    assert read_config(tmp_path).to_dict() == type(made).from_dict(
        config._fewest_settings(again)
    ).to_dict() | {key: value for key, value in again.to_dict().items() if config._UNUSED.fullmatch(key)}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("gemma2", {"final_logit_softcapping": 20.0}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 128}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}),
        ("gemma3_text", {"query_pre_attn_scalar": 128}),
        ("granite", {"logits_scaling": 8.0}),
        ("granite", {"residual_multiplier": 0.5}),
        ("qwen3_moe", {"num_experts_per_tok": 4}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("opt", {"_remove_final_layer_norm": True}),
    ],
)
def test_settings_of_other_architectures_count(kind, changed):
    plain, other = AutoConfig.for_model(kind), AutoConfig.for_model(kind, **changed)
    assert config._fewest_settings(plain) != config._fewest_settings(other)


def test_settings_of_a_text_model_in_a_wrapper_count():
    plain, other = Gemma3Config(), Gemma3Config(text_config={"rms_norm_eps": 1e-4})
    assert config._fewest_settings(plain) != config._fewest_settings(other)
    assert text_config(other).rms_norm_eps == 1e-4
    assert text_config(text_config(other)) is text_config(other)


def test_what_is_left_out_is_known_to_change_nothing():
    """Of all causal models that transformers has: a new name here has to be looked at."""
    kinds = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]
    names = {field.name for kind in kinds for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    dropout = {name for name in names if "dropout" in name or name.endswith("pdrop")}
    assert {name for name in names if config._UNUSED.fullmatch(name)} - dropout <= {
        *("transformers_version", "architectures", "dtype", "use_cache", "return_dict", "problem_type"),
        *("output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef"),
        *("chunk_size_feed_forward", "id2label", "label2id", "num_labels", "tokenizer_class"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("initializer_range", "initializer_factor", "embedding_initializer_range"),
    }


def test_own_code_is_part_of_the_configuration(folder):
    (folder / "modeling_own.py").write_text("x = 1\n")
    assert configuration_digests(folder, own_code=True) == configuration_digests(folder)
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    plain, own = configuration_digests(folder), configuration_digests(folder, own_code=True)
    assert "code" not in plain
    (folder / "modeling_own.py").write_text("x = 2\n")
    assert configuration_digests(folder) == plain
    assert configuration_digests(folder, own_code=True)["code"] != own["code"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "lamma"}, r"model_type is 'lamma', which transformers [\d.]+ does not know"),
        ({"model_type": None}, r"model_type is None"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, r"model_type is 'x'"),
        ({"model_type": "t5"}, r"t5 is an encoder-decoder"),
        ({"model_type": "clip"}, r"transformers has no causal language model of type clip"),
        ({"num_attention_heads": "many"}, r"transformers cannot load it"),
    ],
)
def test_a_configuration_of_no_model_is_refused_before_any_weight_is_read(folder, values, said):
    (folder / "model.safetensors").write_bytes(b"")
    change(folder, **values)
    with pytest.raises(BitassayError, match=rf"config\.json: {said}"):
        read_config(folder)


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", None]
)
def test_a_folder_without_tokenizer_files_is_refused(folder, kind):
    """Of some classes transformers makes an empty tokenizer then."""
    (folder / "tokenizer.json").unlink()
    if kind is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        change(folder, "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(BitassayError, match=r"no tokenizer files .*tokenizer\.json"):
        load(folder)


def test_a_tokenizer_of_bytes_needs_no_files(folder):
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    assert load(folder).tokenizer("a").input_ids


def test_another_vocabulary_file_is_part_of_the_tokenizer(folder):
    before = identity(load(folder)).tokenizer_digest
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.json")
    first = identity_of(folder)
    (folder / "tokenizer.4.json").write_text("other")
    assert len({before, first, identity_of(folder)}) == 3


def identity_of(folder):
    return Identity(resolve(folder)).tokenizer_digest


def test_a_head_that_is_untied_says_so_everywhere():
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    untie(model)
    assert not model.config.tie_word_embeddings
    assert not text_config(model).tie_word_embeddings


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_what_was_asked_for_not_what_config_says(folder, implementation):
    change(folder, attn_implementation="eager")
    assert text_config(load(folder))._attn_implementation == "sdpa"
    assert text_config(load(folder, attention=implementation))._attn_implementation == implementation


def test_an_architecture_without_sdpa_runs_and_says_so(tmp_path, stories):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes))
    model.save_pretrained(tmp_path)
    stories.tokenizer.save_pretrained(tmp_path)
    said = []
    loaded = load(tmp_path, progress=lambda what, *_: said.append(what))
    assert text_config(loaded)._attn_implementation == "eager"
    assert any("no SDPA attention" in line for line in said)
    with pytest.raises(BitassayError, match="does not support") as caught:
        load(tmp_path, attention="sdpa")
    assert "auto" in caught.value.remedy
    with pytest.raises(BitassayError, match="unknown attention 'spda'; the nearest are 'sdpa'"):
        load(tmp_path, attention="spda")
    assert torch.isfinite(loaded(torch.arange(3, 9)[None]).logits).all()

"""A GGUF file says what the model and its tokenizer are, or it is not written."""

import json

import pytest
import torch
from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.gguf_splitting import SPLITTINGS
from bitassay.models.gguf_vocabulary import PREPEND_KEY, read_tokenizer
from bitassay.models.source import resolve
from bitassay.quantization.export.gguf_file import check_gguf, write_gguf
from bitassay.quantization.export.gguf_tokenizer import PROBES, tokenizer_keys
from bitassay.testing.tiny import tiny_model
from gguf_reference import TRICKY

SIZE = 700


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Dequantized files go into a folder of the test's own."""
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))


def byte_level(splitter, ignore_merges=False, **tokens):
    """A byte-level tokenizer that was trained with this splitter."""
    learner = Tokenizer(BPE(ignore_merges=ignore_merges))
    learner.pre_tokenizer, learner.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 20,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([*TRICKY, *PROBES, *(text * 2 for text in TRICKY)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, **{"eos_token": "<|end|>", "bos_token": "<|begin|>"} | tokens
    )


def sentencepiece(**parts):
    """stories260k's tokenizer with these parts of its description changed."""
    content = json.loads((resolve("stories260k").folder / "tokenizer.json").read_text()) | parts
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}  # fmt: skip
REPLACED = PREPENDED["normalizers"][1]


def metaspace(scheme):
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


def same_ids(ours, theirs):
    for text in (*TRICKY, *PROBES, "<s> a</s> b", "a<|end|> b"):
        assert ours(text).input_ids == theirs(text).input_ids, text


@pytest.mark.parametrize("name", [name for name, way in SPLITTINGS.items() if way.byte_level])
def test_every_way_of_splitting_comes_back(name):
    way = SPLITTINGS[name]
    given = byte_level(way.pre_tokenizer(), way.ignore_merges)
    keys, notes = tokenizer_keys(given, SIZE, [0])
    written = SPLITTINGS[keys["tokenizer.ggml.pre"]]
    assert (written.patterns, written.ignore_merges) == (way.patterns, way.ignore_merges)
    assert not notes
    same_ids(read_tokenizer(keys), given)


def test_hub_spellings_of_a_splitter_are_known():
    """`Removed` with `invert` keeps the matches, which is the same for patterns that match everything."""
    pattern = SPLITTINGS["qwen2"].patterns[0]
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ]
    keys, _ = tokenizer_keys(byte_level(pre_tokenizers.Sequence(parts)), SIZE, [0])
    assert keys["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize("splitter", [
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    pre_tokenizers.Sequence([pre_tokenizers.Split("x", "merged_with_next"), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
])  # fmt: skip
def test_other_ways_of_splitting_are_refused(splitter):
    with pytest.raises(BitassayError, match="no name that is known here"):
        tokenizer_keys(byte_level(splitter), SIZE, [0])


def test_unicode_normalization_is_kept_for_us_and_said_of_llama_cpp():
    given = byte_level(SPLITTINGS["qwen2"].pre_tokenizer())
    given.backend_tokenizer.normalizer = normalizers.NFC()
    keys, notes = tokenizer_keys(given, SIZE, [0])
    assert any("NFC" in note for note in notes)
    rebuilt = read_tokenizer(keys)
    same_ids(rebuilt, given)
    assert rebuilt("cafe\u0301").input_ids == rebuilt("caf\u00e9").input_ids
    given.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BitassayError, match="no normalizer Lowercase"):
        tokenizer_keys(given, SIZE, [0])


@pytest.mark.parametrize(("flag", "value"), [("lstrip", True), ("rstrip", True)])
def test_tokens_that_swallow_spaces_are_refused(flag, value):
    given = byte_level(SPLITTINGS["gpt-2"].pre_tokenizer())
    given.add_tokens([AddedToken("<odd>", special=True, normalized=False, **{flag: value})])
    with pytest.raises(BitassayError, match="<odd>"):
        tokenizer_keys(given, SIZE, [0])


def test_added_tokens_come_back():
    given = byte_level(SPLITTINGS["llama-bpe"].pre_tokenizer())
    given.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    given.add_special_tokens({"pad_token": "<pad>"})
    keys, _ = tokenizer_keys(given, SIZE, [0])
    rebuilt = read_tokenizer(keys)
    text = "a<think>b<pad>c<|end|>"
    assert rebuilt(text).input_ids == given(text).input_ids
    assert rebuilt.pad_token == "<pad>"
    assert rebuilt.decode(rebuilt(text).input_ids, skip_special_tokens=True) == "a<think>bc"


@pytest.mark.parametrize(("parts", "prefix", "scheme"), [
    ({"normalizer": PREPENDED, "pre_tokenizer": None}, True, None),
    ({"normalizer": REPLACED, "pre_tokenizer": None}, False, None),
    ({"normalizer": None, "pre_tokenizer": metaspace("always")}, True, "always"),
    ({"normalizer": None, "pre_tokenizer": metaspace("first")}, True, "first"),
    ({"normalizer": None, "pre_tokenizer": metaspace("never")}, False, None),
])  # fmt: skip
def test_the_space_in_front(parts, prefix, scheme):
    given = sentencepiece(**parts)
    keys, notes = tokenizer_keys(given, 512, [2])
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys.get(PREPEND_KEY) == scheme
    assert any("add_space_prefix" in note for note in notes) == (scheme is not None)
    same_ids(read_tokenizer(keys), given)


@pytest.mark.parametrize(("single", "first", "last"), [
    (["<s>", "$A"], True, False),
    (["$A"], False, False),
    (["$A", "</s>"], False, True),
    (["<s>", "$A", "</s>"], True, True),
])  # fmt: skip
def test_what_stands_around_a_text(single, first, last):
    given = sentencepiece()
    given.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    keys, _ = tokenizer_keys(given, 512, [2])
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (first, last)
    same_ids(read_tokenizer(keys), given)


def test_what_else_stands_around_a_text_is_refused():
    given = sentencepiece()
    given.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    with pytest.raises(BitassayError, match="in another way"):
        tokenizer_keys(given, 512, [2])


def test_chat_templates(stories, tmp_path):
    for name, template in (
        ("one", "plain"),
        ("several", {"default": "plain", "tool_use": "tools", "rag": "documents"}),
        ("nameless", {"tool_use": "tools"}),
        ("none", None),
    ):
        base = load("stories260k")
        base.tokenizer.chat_template = template
        written = write_gguf(base, tmp_path / f"{name}.gguf")
        fields = GGUFReader(written.path).fields
        assert ("tokenizer.chat_template" in fields) == (name in ("one", "several"))
        assert any("chat templates" in note for note in written.notes) == (name == "nameless")
        if name == "several":
            assert fields["tokenizer.chat_templates"].contents() == ["tool_use", "rag"]
        assert load(written.path).tokenizer.chat_template == template


def test_all_that_ends_a_generation(tmp_path):
    base = load("stories260k")
    base.generation_config.eos_token_id = [2, 300, 301, 302]
    written = write_gguf(base, tmp_path / "m.gguf")
    assert any("[302] end a generation too" in note for note in written.notes)
    assert load(written.path).generation_config.eos_token_id == [2, 300, 301]


def test_a_changed_tokenizer_of_a_gguf_base_is_written_anew(stories, tmp_path):
    write_gguf(stories, tmp_path / "base.gguf")
    base = load(tmp_path / "base.gguf")
    base.tokenizer.chat_template = "mine"
    write_gguf(base, tmp_path / "again.gguf")
    assert load(tmp_path / "again.gguf").tokenizer.chat_template == "mine"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_an_activation_that_llama_cpp_does_not_have(architecture, activation):
    base = tiny_model(architecture, num_hidden_layers=1, hidden_act=activation)
    with pytest.raises(BitassayError, match=f"no hidden_act = {activation}"):
        check_gguf(base, None)


@pytest.mark.parametrize(("architecture", "changes", "message"), [
    ("qwen3", {"attention_bias": True}, "no biases for attn_output"),
    ("qwen2", {"head_dim": 32}, "no heads of their own size"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
])  # fmt: skip
def test_what_llama_cpp_does_not_have_is_refused(architecture, changes, message):
    with pytest.raises(BitassayError, match=message):
        check_gguf(tiny_model(architecture, num_hidden_layers=1, **changes), None)


def test_a_field_that_the_file_does_not_carry_is_refused():
    """Whatever a later transformers adds to a configuration must not be dropped."""
    base = tiny_model("llama", num_hidden_layers=1)
    kind = type(base.config)
    later = type(
        "LaterConfig", (kind,), {"__annotations__": {"logit_multiplier": float}, "logit_multiplier": 1.0}
    )
    later.__dataclass_fields__ = {**kind.__dataclass_fields__, "logit_multiplier": None}
    base.config.__class__ = later
    base.config.logit_multiplier = 3.0
    with pytest.raises(BitassayError, match=r"no logit_multiplier = 3\.0"):
        check_gguf(base, None)


@pytest.mark.parametrize(("architecture", "changes"), [
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 3e-5, "hidden_act": "swish"}),
    ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}),
    ("qwen2", {}),
    ("mistral", {"head_dim": 32}),
])  # fmt: skip
def test_what_is_written_is_the_model(tmp_path, architecture, changes):
    base = tiny_model(architecture, num_hidden_layers=2, **changes)
    for parameter in base.parameters():
        parameter.data = (parameter + torch.randn_like(parameter) * 0.05).half().float()
    again = load(write_gguf(base, tmp_path / "m.gguf").path)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, base(ids).logits, rtol=0, atol=1e-5)

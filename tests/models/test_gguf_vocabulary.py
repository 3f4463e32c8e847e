"""Tokenizers of GGUF files beside llama.cpp's own, whose ids `gguf_reference.py` stored, and what their other
keys do."""

import json

import pytest
from transformers import AutoTokenizer

from bitassay.errors import BitassayError
from bitassay.models.gguf_splitting import SPLITTINGS, patterns_of
from bitassay.models.gguf_vocabulary import merges_of, read_tokenizer
from gguf_reference import (
    CONTROL,
    TABLE,
    TRICKY,
    USER_DEFINED,
    fields,
    sentencepiece_fields,
)

REFERENCE = json.loads(TABLE.read_text())
NAMES = sorted(REFERENCE["row_of"])
# llama.cpp has no classes of letter case: it takes every letter beyond ASCII for both cases, does not count
# marks as letters, and joins upper-case runs otherwise. Here stand the published patterns.
CASED = (
    "tekken gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m tiny_aya cohere2moe youtu kimi-k2"
)
OTHERWISE = dict.fromkeys(CASED.split(), ("Camel", "É", "caf", "ا", "न", "é"))
# The ideographic space is no \s to the engine that llama.cpp splits these with, other digits no \d.
OTHERWISE |= dict.fromkeys(("deepseek-llm", "deepseek-coder"), ("x\u00a0",)) | {"superbpe": ("\u0661",)}
BYTE_LEVEL = {name: splitting for name, splitting in SPLITTINGS.items() if splitting.byte_level}


def byte_level(name="gpt-2", **changes):
    given = fields(name, REFERENCE["tokens"], REFERENCE["merges"])
    return given | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("way", dict.fromkeys(BYTE_LEVEL.values()), ids=lambda way: way.patterns[0][:12])
def test_splits_as_llama_cpp(way):
    """One name of each way: the others have the same ids in the table."""
    name, *others = [name for name in NAMES if SPLITTINGS[name] == way]
    assert {REFERENCE["row_of"][other] for other in others} <= {REFERENCE["row_of"][name]}
    rebuilt = read_tokenizer(byte_level(name))
    for text, ids in zip(TRICKY, REFERENCE["rows"][REFERENCE["row_of"][name]], strict=True):
        if not text.startswith(OTHERWISE.get(name, ("\0",))):
            assert rebuilt(text).input_ids == ids, text


def test_the_reference_tells_ways_of_splitting_apart():
    """A table in which everything is alike would show nothing."""
    assert len(REFERENCE["rows"]) > 20
    assert len({json.dumps(row) for row in REFERENCE["rows"]}) == len(REFERENCE["rows"])


def test_every_name_of_the_table_was_compared():
    assert set(NAMES) == set(BYTE_LEVEL)


@pytest.mark.parametrize(("name", "text", "pieces"), [
    ("tekken", "\u0391\u03b2\u0393", ["\u0391\u03b2", "\u0393"]),
    ("gpt-4o", "HTTPServer's cafe\u0301", ["HTTPServer's", " cafe\u0301"]),
    ("kimi-k2", "abc\u4f60\u597ddef", ["abc", "\u4f60\u597d", "def"]),
    ("tiny_aya", "1234567", ["1", "234", "567"]),
])  # fmt: skip
def test_published_patterns_where_llama_cpp_approximates(name, text, pieces):
    splitter = SPLITTINGS[name].pre_tokenizer()
    assert [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_as_llama_cpp(space):
    rebuilt = read_tokenizer(sentencepiece_fields(space))
    for text, ids in zip(TRICKY, REFERENCE["spaced"][str(space)], strict=True):
        assert rebuilt(text).input_ids == ids, text


def test_text_comes_back():
    for given in (byte_level(), sentencepiece_fields(True), sentencepiece_fields(False)):
        rebuilt = read_tokenizer(given)
        for text in TRICKY:
            if CONTROL not in text and USER_DEFINED not in text:
                assert rebuilt.decode(rebuilt(text).input_ids) == text


@pytest.mark.parametrize(("name", "keys", "first", "last"), [
    ("gpt-2", {}, False, False),
    ("gpt-2", {"add_bos_token": True}, True, False),
    ("gpt-2", {"add_eos_token": True}, False, True),
    ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ("llama-bpe", {"add_bos_token": None}, True, False),
    ("tekken", {"add_bos_token": None}, True, False),
    ("qwen2", {"add_bos_token": None}, False, False),
    ("llama-bpe", {"add_bos_token": False}, False, False),
])  # fmt: skip
def test_what_stands_around_a_text(name, keys, first, last):
    given = byte_level(name, **keys)
    given = {key: value for key, value in given.items() if value is not None}
    ids = read_tokenizer(given)("plain words").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (first, last)
    assert len(ids) == 2 + first + last


def test_gemma4_merges_characters_and_falls_back_to_bytes():
    tokens = ["<bos>", "a", "b", "\u2581", "ab", "\u2581ab", "\n", "<0xC3>", "<0xA9>"]
    rebuilt = read_tokenizer({
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "\u2581 ab"],
        "tokenizer.ggml.bos_token_id": 0,
    })  # fmt: skip
    ids = rebuilt("ab ab\nb\u00e9").input_ids
    assert [tokens[index] for index in ids] == ["<bos>", "ab", "\u2581ab", "\n", "b", "<0xC3>", "<0xA9>"]
    assert rebuilt.decode(ids[1:]) == "ab ab\nb\u00e9"


def test_kinds_of_tokens():
    rebuilt = read_tokenizer(byte_level())
    ids = rebuilt(f"a{CONTROL}b{USER_DEFINED}").input_ids
    assert rebuilt.decode(ids, skip_special_tokens=True) == f"ab{USER_DEFINED}"
    # A token that llama.cpp knows by its name is special whatever its type.
    tokens = [*REFERENCE["tokens"], "<|im_end|>", "[PAD7]"]
    given = byte_level(tokens=tokens, token_type=[*byte_level()["tokenizer.ggml.token_type"], 1, 5])
    rebuilt = read_tokenizer(given)
    assert rebuilt("x<|im_end|>").input_ids[-1] == len(tokens) - 2
    assert len(tokens) - 1 not in rebuilt("[PAD7]").input_ids


def test_merges_are_ignored_for_whole_tokens():
    """Llama 3's tokenizers have tokens that no merge makes."""
    tokens = [*REFERENCE["tokens"], "zyxwv"]
    types = [*byte_level()["tokenizer.ggml.token_type"], 1]
    found = {
        name: read_tokenizer(byte_level(name, tokens=tokens, token_type=types))("zyxwv").input_ids
        for name in ("llama-bpe", "smaug-bpe")
    }
    assert found["llama-bpe"] == [len(tokens) - 1]
    assert len(found["smaug-bpe"]) > 1


def test_names_of_special_tokens():
    rebuilt = read_tokenizer(byte_level(padding_token_id=3, unknown_token_id=0, eot_token_id=3))
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id, rebuilt.pad_token_id) == (1, 2, 3)
    assert rebuilt.unk_token == "<unk>"


def test_chat_templates():
    one = byte_level() | {"tokenizer.chat_template": "one"}
    assert read_tokenizer(one).chat_template == "one"
    several = one | {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "two"}
    assert read_tokenizer(several).chat_template == {"default": "one", "tool_use": "two"}
    assert read_tokenizer(byte_level()).chat_template is None


def test_runs_of_spaces_become_one():
    given = sentencepiece_fields(True)
    single = read_tokenizer(given | {"tokenizer.ggml.remove_extra_whitespaces": True})
    assert single("a   b").input_ids == read_tokenizer(given)("a b").input_ids
    assert single("a   b").input_ids != read_tokenizer(given)("a   b").input_ids


def test_phi_3_swallows_spaces_after_special_tokens():
    given = sentencepiece_fields(True) | {"general.name": "Phi-3 Mini"}
    ids = read_tokenizer(given)(f"a{CONTROL}  b").input_ids
    assert ids == read_tokenizer(given)(f"a{CONTROL}b").input_ids
    assert ids != read_tokenizer(sentencepiece_fields(True))(f"a{CONTROL}  b").input_ids


@pytest.mark.parametrize(("changes", "named"), [
    ({"tokenizer.ggml.pre": "qwen9"}, r"tokenizer\.ggml\.pre = qwen9"),
    ({"tokenizer.ggml.pre": "whitespace"}, r"tokenizer\.ggml\.pre = whitespace"),
    ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model = bert"),
    ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model = t5"),
    ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer\.ggml\.model = rwkv"),
    ({"tokenizer.ggml.model": "plamo2"}, r"tokenizer\.ggml\.model = plamo2"),
    ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces = True"),
    ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix = True"),
    ({"tokenizer.ggml.add_sep_token": True}, "add_sep_token = True"),
    ({"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
    ({"tokenizer.ggml.bos_token_id": 99999}, "bos_token_id = 99999"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' stands there twice"),
])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(changes, named):
    with pytest.raises(BitassayError, match=named):
        read_tokenizer(byte_level() | changes)


def test_missing_merges_and_missing_bos():
    without = {k: v for k, v in byte_level().items() if k != "tokenizer.ggml.merges"}
    with pytest.raises(BitassayError, match=r"tokenizer\.ggml\.merges: missing"):
        read_tokenizer(without)
    without = {k: v for k, v in byte_level(add_bos_token=True).items() if "bos_token_id" not in k}
    with pytest.raises(BitassayError, match=r"bos_token_id: missing"):
        read_tokenizer(without)


@pytest.mark.parametrize("name", ["smollm", "qwen2", "tekken", "deepseek-v3"])
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    """transformers picks a class for a tokenizer that it loads, which may bring ways of its own."""
    rebuilt = read_tokenizer(byte_level(name, add_bos_token=True))
    rebuilt.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text).input_ids for text in TRICKY] == [rebuilt(text).input_ids for text in TRICKY]


def test_patterns_of_a_splitter_are_found_again():
    for name, splitting in BYTE_LEVEL.items():
        content = json.loads(splitting.pre_tokenizer().__getstate__())
        assert patterns_of(content) == splitting.patterns, name


def test_merges_follow_the_scores():
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    assert merges_of(vocabulary, [0, 0, -2, -1, -3]) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]

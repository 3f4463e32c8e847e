"""The tokenizer of a GGUF file: handed down from the base model's GGUF, or made from `tokenizer.json`.

llama.cpp does not read how a tokenizer splits text before its merges apply: it knows some ways by name. A
tokenizer that splits in another way is refused, since llama.cpp would silently give other tokens.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from bitassay.errors import BitassayError
from bitassay.record.hashing import canonical_json

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % r"\p{N}": "qwen2", WORDS % r"\p{N}{1,3}": "llama-bpe"}


def copy_tokenizer(writer: GGUFWriter, base: Path) -> None:
    """Hand down every `tokenizer.` entry of the file `base`."""
    for key, field in GGUFReader(base).fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)


def write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Write a tokenizer of `tokenizers`; ids up to `vocabulary` that it does not use are said to be unused.

    Raises BitassayError for a kind that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(f"tokenizers of type {model.get('type')} are not written")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, content, vocabulary)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("Prepend" in canonical_json(content["normalizer"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content["pre_tokenizer"]))
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if isinstance(token, int):
            add(token)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[TokenType]]:
    """The tokens in the order of their ids, and what each is."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    fallback = content["model"].get("byte_fallback")
    for token, index in tokenizer.get_vocab().items():
        if index >= vocabulary:
            raise _unknown(f"token {index}, but the model knows {vocabulary}")
        is_byte = fallback and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in content.get("added_tokens") or ():
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if fallback and isinstance(tokenizer.unk_token_id, int):
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp joins the pair whose result has the highest score; merges come in the order of theirs."""
    rank = {merge.replace(" ", "", 1): -float(place) for place, merge in reversed(list(enumerate(merges)))}
    return [rank.get(token, -float(len(merges))) for token in tokens]


def _split_name(splitter: Any) -> str:
    """llama.cpp's name of a way to split text."""
    parts = (splitter or {}).get("pretokenizers", [splitter or {}])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex"):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex")
    if kinds == ["Split", "ByteLevel"] and pattern in SPLITS:
        return SPLITS[pattern]
    raise _unknown("llama.cpp has no name that is known here for how its tokenizer splits text")


def _unknown(why: str) -> BitassayError:
    return BitassayError(
        f"the tokenizer cannot be written as GGUF: {why}",
        "quantize the GGUF file of the base model, whose tokenizer is handed down",
    )

"""The tokenizer of a GGUF file: handed down from the base model's GGUF, or made from `tokenizer.json`.

llama.cpp does not read how a tokenizer splits text before its merges apply: it knows some ways by name
(`gguf_splitting.py`). What is written is read again (`gguf_vocabulary.py`) and must give the ids that the
tokenizer gives for strings that show differences; one that does not is refused, since llama.cpp would
silently give other tokens. Two things that llama.cpp has no key for are written under keys of ours, for our
own reading, and said in a note: Unicode normalization, and that SentencePiece's space in front is left out
where a text begins with one.
"""

import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from bitassay.errors import BitassayError
from bitassay.models.gguf_splitting import SPLITTINGS, patterns_of
from bitassay.models.gguf_vocabulary import (
    GGML,
    NORMALIZER_KEY,
    PREPEND_KEY,
    SPACE,
    SPECIAL_BY_NAME,
    fields_of,
    merges_of,
    read_tokenizer,
)

# Strings that ways of splitting, joining and normalizing tell apart.
PROBES = (
    *(
        "",
        " ",
        "\n",
        "Once upon",
        " a b  c   d ",
        "\tx\t\ty \t",
        "one\n\ntwo\n \n three\r\nfour\n\n\n",
        "  \n a",
    ),
    *(
        "1 12 123 1234 12345 123456 1234567",
        "3.14 1,000 12:30 v2b1 0x1F",
        "a1b22c333",
        "\u0661\u0662 \u00bd\u2160",
    ),
    *("I've you're he'll it's", "I'VE HE'LL IT'S 'Tis", "it\u2019s", "CamelCase HTTPServer"),
    *(
        "\u00c9t\u00c9 \u041f\u0440\u0415\u0442",
        "caf\u00e9 cafe\u0301 \u212b",
        "\u4f60\u597d\uff0c\u6d4b\u8bd5123\u4e2aabc",
    ),
    *(
        "\u3053\u3093\u30ab\u30bf\u6f22",
        "\uc548\ub155 \uc138\uacc4",
        "\u0645\u064e\u0631\u0652 \u0639\u0644\u064a\u0643\u0645\u060c",
    ),
    *(
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27",
        "\U0001f680\U0001f636\u200d\U0001f32b\ufe0f \u2705",
        "x\u00a0y\u3000z",
    ),
    *("def f(x):\n    return x**2 # n\n", "if (a!=b && c<=d) { e[i++]; }", "wait!!! what??? -- ===="),
    *("a/b.c?d=e&f#g", "__init__ -dash-", "ends with space ", "\ufb01ne \uff21\uff22", "\u0301x"),
)


def copy_tokenizer(writer: GGUFWriter, base: Path) -> None:
    """Hand down every `tokenizer.` entry of the file `base`."""
    for key, field in GGUFReader(base).fields.items():
        if key.startswith("tokenizer.") or key in (PREPEND_KEY, NORMALIZER_KEY):
            inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)


def is_tokenizer_of(base: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `tokenizer` is still the one that the GGUF file `base` describes."""
    rebuilt = read_tokenizer(fields_of(GGUFReader(base)))
    same = rebuilt.chat_template == tokenizer.chat_template
    return same and _difference(tokenizer, rebuilt, []) is None


def write_tokenizer(writer: GGUFWriter, keys: Mapping[str, Any]) -> None:
    """Write what `tokenizer_keys` found."""
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        add[type(value)](key, value)


def tokenizer_keys(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys that describe a tokenizer of `tokenizers`, and notes on what llama.cpp does otherwise.
    Ids up to `vocabulary` without a token are unused; `ends` are ids that end a generation. Raises
    BitassayError for a tokenizer that llama.cpp would not run as what it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model") or {}
    if backend is None or model.get("type") != "BPE":
        raise _refused(f"tokenizers of type {model.get('type')} are not written")
    tokens, types = _tokens(tokenizer, content, vocabulary)
    notes: list[str] = []
    kind = _sentencepiece if model.get("byte_fallback") else _byte_level
    keys = {
        f"{GGML}tokens": tokens,
        f"{GGML}token_type": [int(kind) for kind in types],
        **kind(backend, content, tokens, notes),
        **_special(tokenizer, ends, notes),
        **_chat_templates(tokenizer.chat_template, notes),
    }
    text = _difference(tokenizer, read_tokenizer(keys), _token_probes(content, tokens))
    if text is not None:
        raise _refused(f"llama.cpp would split {text!r} in another way")
    return keys, notes


def _byte_level(
    backend: Tokenizer, content: dict[str, Any], tokens: list[str], notes: list[str]
) -> dict[str, Any]:
    keys = {
        f"{GGML}model": "gpt2",
        f"{GGML}pre": _split_name(backend, content),
        f"{GGML}merges": [" ".join(pair) for pair in _merges(content)],
    }
    match content["normalizer"]:
        case None:
            return keys
        case {"type": "NFC" | "NFKC" as form}:
            notes.append(
                f"{form}: llama.cpp does not normalize Unicode, so it splits decomposed text otherwise"
            )
            return {**keys, NORMALIZER_KEY: form}
        case other:
            raise _refused(f"llama.cpp has no normalizer {other.get('type')} for byte-level tokenizers")


def _sentencepiece(
    backend: Tokenizer, content: dict[str, Any], tokens: list[str], notes: list[str]
) -> dict[str, Any]:
    merges = _merges(content)
    scores = _scores(tokens, merges)
    ids = {token: index for index, token in enumerate(tokens)}
    # Which of two ways to make the same token comes first shows only where they overlap.
    implied = merges_of(ids, scores)
    if set(implied) != set(merges) or ["".join(pair) for pair in implied] != [
        "".join(pair) for pair in merges
    ]:
        notes.append(
            "tokenizer: llama.cpp joins whatever makes a token, this tokenizer the pairs of a list only"
        )
    text = backend.normalizer.normalize_str("x") if backend.normalizer else "x"
    if backend.pre_tokenizer:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    prefix = text.startswith(SPACE)
    keys = {
        f"{GGML}model": "llama",
        f"{GGML}pre": "default",
        f"{GGML}scores": scores,
        f"{GGML}add_space_prefix": prefix,
    }
    if backend.normalizer and backend.normalizer.normalize_str("x  x") == backend.normalizer.normalize_str(
        "x x"
    ):
        notes.append(
            "remove_extra_whitespaces: llama.cpp keeps runs of spaces, of which this tokenizer makes one"
        )
        keys[f"{GGML}remove_extra_whitespaces"] = True
    scheme = (content["pre_tokenizer"] or {}).get("prepend_scheme")
    if prefix and scheme is not None and content["normalizer"] is None:
        notes.append(
            "add_space_prefix: llama.cpp puts a space in front of every text, this tokenizer of none that "
            "begins with a space" + (" or comes after a special token" if scheme == "first" else "")
        )
        keys[PREPEND_KEY] = scheme
    return keys


def _merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in content["model"]["merges"]]  # type: ignore[misc]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    fallback = content["model"].get("byte_fallback")
    for token, index in tokenizer.get_vocab().items():
        if index >= vocabulary:
            raise _refused(f"token {index}, but the model knows {vocabulary}")
        is_byte = fallback and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in content.get("added_tokens") or ():
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if fallback and isinstance(tokenizer.unk_token_id, int):
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """llama.cpp joins the pair whose result has the highest score; merges come in the order of theirs."""
    rank = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(merges)))}
    return [rank.get(token, -float(len(merges))) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, ends: list[int], notes: list[str]) -> dict[str, Any]:
    """The ids of special tokens, and which of them stand around every text."""
    keys: dict[str, Any] = {}
    ids = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
    # What else ends a generation: a turn's end and a message's, as llama.cpp calls them.
    others = [index for index in ends if index != tokenizer.eos_token_id]
    if ids["eos"] is None and others:
        ids["eos"] = others.pop(0)
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    if others[2:]:
        notes.append(f"the tokens {others[2:]} end a generation too, for which GGUF has no key")
    for name, index in ids.items():
        if isinstance(index, int):
            keys[f"{GGML}{name}_token_id"] = index
    around = tokenizer("a").input_ids
    keys[f"{GGML}add_bos_token"] = around[:1] == [tokenizer.bos_token_id]
    keys[f"{GGML}add_eos_token"] = len(around) > 1 and around[-1:] == [tokenizer.eos_token_id]
    return keys


def _chat_templates(templates: str | dict[str, str] | None, notes: list[str]) -> dict[str, Any]:
    """One template, or `default` under the plain key and the others by their names."""
    if not isinstance(templates, dict):
        return {} if templates is None else {"tokenizer.chat_template": templates}
    kept = string.ascii_letters + string.digits + "_"
    named = {
        "".join(letter if letter in kept else "_" for letter in name): text
        for name, text in templates.items()
        if name != "default"
    }
    keys: dict[str, Any] = {"tokenizer.chat_template": templates["default"]} if "default" in templates else {}
    if "default" not in templates:
        notes.append("chat templates: none is called default, so llama.cpp takes none by itself")
    if named:
        keys["tokenizer.chat_templates"] = list(named)
        keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return keys


def _split_name(backend: Tokenizer, content: dict[str, Any]) -> str:
    patterns = patterns_of(content["pre_tokenizer"])
    names = [name for name, way in SPLITTINGS.items() if way.byte_level and way.patterns == patterns]
    ignores_merges = bool(content["model"].get("ignore_merges"))
    exact = [name for name in names if SPLITTINGS[name].ignore_merges == ignores_merges]
    if exact:
        return exact[0]
    # Whether merges are ignored for pieces that are tokens says nothing where merges make every token.
    merging = BPE(content["model"]["vocab"], _merges(content))
    added = {token["content"] for token in content.get("added_tokens") or ()}
    if names and all(
        len(merging.tokenize(token)) == 1 for token in backend.get_vocab() if token not in added
    ):
        return names[0]
    raise _refused("llama.cpp has no name that is known here for how its tokenizer splits text")


def _token_probes(content: dict[str, Any], tokens: list[str]) -> Iterator[str]:
    """Strings with special tokens in them: one of each kind, and those that llama.cpp takes for special."""
    seen: dict[tuple[bool, ...], int] = {}
    for added in content.get("added_tokens") or ():
        kind = tuple(added[flag] for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 8:
            yield f"a{added['content']}b {added['content']} c"
    yield from (f"a{token}b" for token in tokens if token in SPECIAL_BY_NAME)


def _difference(
    tokenizer: PreTrainedTokenizerBase, rebuilt: PreTrainedTokenizerBase, more: Iterator[str] | list[str]
) -> str | None:
    for text in (*PROBES, *more):
        if tokenizer(text, verbose=False).input_ids != rebuilt(text, verbose=False).input_ids:
            return text
    return None


def _refused(why: str) -> BitassayError:
    return BitassayError(
        f"the tokenizer cannot be written as GGUF: {why}",
        "quantize the GGUF file of the base model, whose tokenizer is handed down",
    )

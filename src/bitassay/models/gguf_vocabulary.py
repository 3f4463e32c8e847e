"""The tokenizer of a GGUF file, rebuilt from the file's own keys as one of the `tokenizers` package.

What the keys mean is what llama.cpp does with them (src/llama-vocab.cpp): which tokens are special, what
comes before and after a text, how it is split (`gguf_splitting.py`). Two kinds are read. `gpt2` is byte-level
BPE with the file's merges; `llama` is SentencePiece's BPE, where of two neighbours the pair is joined whose
result has the highest score, so that the merges follow from the scores. A file of ours also says what
llama.cpp has no key for: how a space comes in front (`PREPEND_KEY`) and Unicode normalization.

Refused by name: WordPiece, unigram, RWKV's and PLaMo's tokenizers, ways of splitting that are not in the
table, and keys that are not known here, since one of them may change the tokens.
"""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bitassay.errors import BitassayError, suggestion
from bitassay.models.gguf_splitting import SPLITTINGS, Splitting

GGML = "tokenizer.ggml."
PREPEND_KEY, NORMALIZER_KEY = "bitassay.tokenizer.prepend_scheme", "bitassay.tokenizer.normalizer"
SPACE = "\u2581"
# Ids that hold where the file gives none, by kind: llama.cpp's, but for its 11 of byte-level tokenizers,
# which is a token like any other in most of them.
DEFAULT_IDS = {
    "gpt2": {},
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gemma4": {},
}
# Tokens that are special whatever type the file gives them, as llama.cpp finds them by their text.
_SPECIAL_NAMES = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>
    <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    <\uff5cend\u2581of\u2581sentence\uff5c> [e~[ <|fim_prefix|> <fim-prefix> <fim_prefix> <PRE>
    <\uff5cfim\u2581begin\uff5c> \u2581<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix>
    <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF> <|code_suffix|> <|suffix|> <|fim_middle|>
    <fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> \u2581<MID> <|code_middle|> <|middle|>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
    <|file_sep|>
"""
SPECIAL_BY_NAME = frozenset(_SPECIAL_NAMES.split())
_SPECIAL_IDS = (
    "bos eos eot eom unknown padding seperator separator mask cls fim_pre fim_suf fim_mid fim_pad fim_rep "
    "fim_sep prefix suffix middle"
)
_OTHERS = (
    "model pre tokens token_type token_type_count scores merges add_bos_token add_eos_token add_sep_token "
    "add_space_prefix remove_extra_whitespaces"
)
KNOWN = {
    *(f"{GGML}{name}_token_id" for name in _SPECIAL_IDS.split()),
    *(f"{GGML}{name}" for name in _OTHERS.split()),
    "tokenizer.chat_templates",
    "tokenizer.huggingface.json",
}


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    """Every key of a file with its value, but for those that `GGUFReader` adds."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def read_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a file with these keys describes.

    Raises BitassayError for what is not known here.
    """
    kind = str(fields.get(f"{GGML}model"))
    if kind not in DEFAULT_IDS:
        raise BitassayError(
            f"tokenizer.ggml.model = {kind}: tokenizers of this kind are not read, "
            f"only {', '.join(DEFAULT_IDS)}"
        )
    _check_keys(fields)
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(fields[f"{GGML}tokens"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise BitassayError(f"tokenizer.ggml.tokens: {twice!r} stands there twice")
    ids = special_ids(fields, len(tokens))
    splitting = None
    if kind == "llama":
        tokenizer = _sentencepiece(fields, vocabulary)
        add_bos = True
    else:
        splitting = splitting_of(fields)
        tokenizer = _bpe(fields, vocabulary, splitting)
        add_bos = splitting.add_bos
    _add_special(tokenizer, fields, tokens)
    ends = {
        "bos": fields.get(f"{GGML}add_bos_token", add_bos),
        "eos": fields.get(f"{GGML}add_eos_token", False),
    }
    if nameless := [name for name, add in ends.items() if add and name not in ids]:
        raise BitassayError(f"{GGML}{nameless[0]}_token_id: missing, but every text gets this token")
    first, last = (ids[name] if add else None for name, add in ends.items())
    _surround(tokenizer, tokens, first, last)
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask", "cls": "cls"}
    named |= {"seperator": "sep", "separator": "sep"}
    rebuilt = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{ours}_token": tokens[ids[theirs]] for theirs, ours in named.items() if theirs in ids},
    )
    rebuilt.chat_template = chat_templates(fields)
    return rebuilt


def special_ids(fields: Mapping[str, Any], count: int) -> dict[str, int]:
    """The ids of special tokens by llama.cpp's words for them: `bos`, `eos`, `eot`, `unknown` and so on."""
    # A default is meant for vocabularies of the usual size; a small one has something else there.
    defaults = DEFAULT_IDS[fields[f"{GGML}model"]]
    ids = {name: index for name, index in defaults.items() if index < count}
    for name in _SPECIAL_IDS.split():
        if (index := fields.get(f"{GGML}{name}_token_id")) is None:
            continue
        if not 0 <= index < count:
            raise BitassayError(f"{GGML}{name}_token_id = {index}, but there are {count} tokens")
        ids[name] = int(index)
    return ids


def chat_templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or those by name where there are several."""
    start = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{start}."): text for key, text in fields.items() if key.startswith(f"{start}.")
    }
    if named and start in fields:
        return {"default": fields[start], **named}
    return named or fields.get(start)


def splitting_of(fields: Mapping[str, Any]) -> Splitting:
    """How the file says that text is split."""
    name = "gemma4" if fields[f"{GGML}model"] == "gemma4" else fields.get(f"{GGML}pre") or "default"
    if name not in SPLITTINGS:
        raise BitassayError(
            f"tokenizer.ggml.pre = {name}: this way of splitting text is not known here; "
            f"{suggestion(name, SPLITTINGS)}"
        )
    return SPLITTINGS[name]


def _check_keys(fields: Mapping[str, Any]) -> None:
    unknown = [
        key
        for key in fields
        if key.startswith("tokenizer.")
        and key not in KNOWN
        and key != "tokenizer.chat_template"
        and not key.startswith("tokenizer.chat_template.")
    ]
    if unknown:
        raise BitassayError(f"keys that may change the tokens and are not known here: {', '.join(unknown)}")
    if fields.get(f"{GGML}add_sep_token"):
        raise BitassayError(f"{GGML}add_sep_token = True: tokenizers that do this are not read")
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if fields.get(f"{GGML}{name}") and fields[f"{GGML}model"] != "llama":
            raise BitassayError(
                f"{GGML}{name} = True for a byte-level tokenizer: llama.cpp does nothing of the kind, "
                "so it is not clear what is meant"
            )


def _bpe(fields: Mapping[str, Any], vocabulary: dict[str, int], splitting: Splitting) -> Tokenizer:
    merges = fields.get(f"{GGML}merges")
    if merges is None:
        raise BitassayError("tokenizer.ggml.merges: missing, so the tokenizer cannot be rebuilt")
    # A token may begin with the space that parts a pair, hence the search from the second character on.
    cuts = [merge.index(" ", 1) for merge in merges]
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=pairs,
            ignore_merges=splitting.ignore_merges,
            byte_fallback=not splitting.byte_level,
        )
    )
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    if splitting.byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = _spaces_back(strip=False)
    if (form := fields.get(NORMALIZER_KEY)) is not None:
        tokenizer.normalizer = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}[form]()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    prefix = bool(fields.get(f"{GGML}add_space_prefix", True))
    unknown = special_ids(fields, len(vocabulary)).get("unknown")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges_of(vocabulary, list(fields[f"{GGML}scores"])),
            unk_token=None if unknown is None else fields[f"{GGML}tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    scheme = fields.get(PREPEND_KEY) if prefix else None
    if scheme is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        # llama.cpp heeds this key for unigram tokenizers only, and joins no spaces here.
        single = fields.get(f"{GGML}remove_extra_whitespaces")
        steps = [normalizers.Replace(Regex(" {2,}"), " ")] if single else []
        steps += [normalizers.Prepend(SPACE)] if prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = _spaces_back(strip=prefix)
    return tokenizer


def _spaces_back(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if strip else steps)


def merges_of(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that scores stand for: every way to make a token of two, the best score first. Among equals
    the longer left half comes first, as in the `tokenizer.json` that is made of a SentencePiece model."""
    found = [
        (-scores[index], -cut, token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: list[str]) -> None:
    """Mark the tokens that are found in a text before anything else is done with it."""
    types = fields.get(f"{GGML}token_type") or [TokenType.NORMAL] * len(tokens)
    # Phi-3's special tokens swallow the spaces after them; llama.cpp knows the family by its name.
    name = str(fields.get("general.name", "")).lower()
    swallow = "phi-3" in name or "phi3" in name
    special, user_defined = [], []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in SPECIAL_BY_NAME:
            strip = swallow and token not in ("<unk>", "<s>", "<|endoftext|>")
            special.append(AddedToken(token, normalized=False, special=True, rstrip=strip))
        elif kind == TokenType.USER_DEFINED:
            user_defined.append(AddedToken(token, normalized=False, special=False, rstrip=swallow))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(user_defined)


def _surround(tokenizer: Tokenizer, tokens: list[str], first: int | None, last: int | None) -> None:
    """Put `first` before and `last` after every text."""
    ends = [(tokens[index], index) for index in (first, last) if index is not None]
    if not ends:
        return
    before, after = ([] if index is None else [tokens[index]] for index in (first, last))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[
            *before,
            "$A:0",
            *after,
            *[f"{token}:1" for token in before],
            "$B:1",
            *[f"{t}:1" for t in after],
        ],
        special_tokens=ends,
    )

"""The tokenizer of a GGUF file, rebuilt from the file's own keys as one of the `tokenizers` package.

What the keys mean is what llama.cpp does with them (src/llama-vocab.cpp): which tokens are special, what
comes before and after a text, how it is split (`gguf_splitting.py`). Three kinds are read. `gpt2` is
byte-level BPE with the file's merges, `gemma4` is BPE over characters with the file's merges; `llama` is
SentencePiece's BPE, where of two neighbours the pair is joined whose result has the highest score, so that
the merges follow from the scores. A file of ours also says what llama.cpp has no key for: how a space comes
in front (`PREPEND_KEY`) and Unicode normalization.

Refused by name: WordPiece, unigram, RWKV's and PLaMo's tokenizers, ways of splitting that are not in the
table, and keys that are not known here, since one of them may change the tokens.
"""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFReader, Keys, TokenType
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
DEFAULT_IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "gemma4": {}}
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
KNOWN = {key for key in vars(Keys.Tokenizer).values() if str(key).startswith(GGML)}
KNOWN -= {Keys.Tokenizer.PRECOMPILED_CHARSMAP}
KNOWN |= {f"{GGML}separator_token_id", f"{GGML}cls_token_id"}
ID = "_token_id"
TEMPLATE = "tokenizer.chat_template"
# What transformers calls the special tokens that it has an attribute for.
_ATTRIBUTES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask", "cls": "cls"}
_ATTRIBUTES |= {"seperator": "sep", "separator": "sep"}


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    """Return every key of a file with its value, but for those that `GGUFReader` adds."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def read_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer that these keys describe. Raises BitassayError for what is not known here."""
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
    if kind == "llama":
        tokenizer, add_bos = _sentencepiece(fields, vocabulary), True
    else:
        splitting = splitting_of(fields)
        tokenizer, add_bos = _bpe(fields, vocabulary, splitting), splitting.add_bos
    _add_special(tokenizer, fields, tokens)
    ends = {
        "bos": fields.get(f"{GGML}add_bos_token", add_bos),
        "eos": fields.get(f"{GGML}add_eos_token", False),
    }
    if nameless := [name for name, add in ends.items() if add and name not in ids]:
        raise BitassayError(f"{GGML}{nameless[0]}_token_id: missing, but every text gets this token")
    first, last = (ids[name] if add else None for name, add in ends.items())
    _surround(tokenizer, tokens, first, last)
    rebuilt = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{ours}_token": tokens[ids[theirs]] for theirs, ours in _ATTRIBUTES.items() if theirs in ids},
    )
    rebuilt.chat_template = chat_templates(fields)
    return rebuilt


def special_ids(fields: Mapping[str, Any], count: int) -> dict[str, int]:
    """Return the ids of special tokens by llama.cpp's words: `bos`, `eos`, `eot`, `unknown` and so on."""
    # A default is meant for vocabularies of the usual size; a small one has something else there.
    defaults = DEFAULT_IDS[fields[f"{GGML}model"]]
    ids = {name: index for name, index in defaults.items() if index < count}
    for key in fields.keys() & {key for key in KNOWN if key.endswith(ID)}:
        if not 0 <= fields[key] < count:
            raise BitassayError(f"{key} = {fields[key]}, but there are {count} tokens")
        ids[key.removeprefix(GGML).removesuffix(ID)] = int(fields[key])
    return ids


def chat_templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or templates by name where there are several."""
    named = {
        key.removeprefix(f"{TEMPLATE}."): text
        for key, text in fields.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    if named and TEMPLATE in fields:
        return {"default": fields[TEMPLATE], **named}
    return named or fields.get(TEMPLATE)


def splitting_of(fields: Mapping[str, Any]) -> Splitting:
    """Return how the file says that text is split. Raises BitassayError for an unknown name."""
    name = "gemma4" if fields[f"{GGML}model"] == "gemma4" else fields.get(f"{GGML}pre") or "default"
    if name not in SPLITTINGS:
        raise BitassayError(
            f"tokenizer.ggml.pre = {name}: this way of splitting text is not known here; "
            f"{suggestion(name, SPLITTINGS)}"
        )
    return SPLITTINGS[name]


def _check_keys(fields: Mapping[str, Any]) -> None:
    aside = (TEMPLATE, "tokenizer.huggingface.json")  # chat_template, chat_templates, chat_template.NAME
    unknown = [
        key
        for key in fields
        if key.startswith("tokenizer.") and key not in KNOWN and not key.startswith(aside)
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
    fallback = not splitting.byte_level
    model = BPE(vocab=vocabulary, merges=pairs, ignore_merges=splitting.ignore_merges, byte_fallback=fallback)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    if splitting.byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence(_spaces_back())
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
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*_spaces_back(), *strip])
    return tokenizer


def _spaces_back() -> list[Any]:
    return [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def merges_of(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges that scores stand for: every way to make a token of two, the best score first. Among
    equals the longer left half comes first, as in the `tokenizer.json` made of a SentencePiece model."""
    ways = [
        (-scores[index], -cut, token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


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
    before, after = ([] if index is None else [(tokens[index], index)] for index in (first, last))
    if before or after:
        single = [*(token for token, _ in before), "$A:0", *(token for token, _ in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=[*before, *after]
        )

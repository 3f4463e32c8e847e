"""How a byte-level tokenizer splits text before its merges apply, by the names that GGUF files give.

A GGUF file says it in one word, `tokenizer.ggml.pre`. The names are those of llama.cpp (src/llama-vocab.cpp,
July 2026), the patterns those of the tokenizers that the names stand for, in their order: each pattern cuts
the pieces that the one before it left, and both what matches and what lies between becomes a piece. Where
llama.cpp says that it approximates a published pattern, because its engine has no case-insensitive groups
and no classes of letter case, the published one stands here.

Left out, and refused by name: `whitespace` and the DNA tokenizers, which are no byte-level ones, and names
of models whose architecture is not read.
"""

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

# What `pre_tokenizers.ByteLevel` does with `use_regex`.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS = r" ?[^\s\p{L}\p{N}]+"


def _words(number: str) -> str:
    """GPT-4's pattern (cl100k) with `number` for its digits."""
    return rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}|{MARKS}[\r\n]*|{SPACES}"


def _cased(number: str, contractions: str) -> str:
    """GPT-4o's pattern (o200k): words end where upper case begins."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contractions}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contractions}|{number}|{MARKS}[\r\n/]*|{SPACES}"
    )


LLAMA3, QWEN2 = _words(THREE_DIGITS), _words(DIGIT)
GPT4O = _cased(THREE_DIGITS, f"{CONTRACTIONS}?")
EAST_ASIAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
DEEPSEEK3 = (
    rf"{ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True)
class Splitting:
    """The patterns of a name. `ignore_merges`: a piece that is a token becomes it, whatever the merges say.
    `add_bos`: what holds where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """Return the splitter of `tokenizers` that does this."""
        # ByteLevel's own regex is the published spelling of GPT2, and of a last step that is this.
        *steps, last = self.patterns
        parts = [_step(pattern) for pattern in (steps if last == GPT2 else self.patterns)]
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == GPT2))
        return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def _step(pattern: str) -> PreTokenizer:
    if pattern in (DIGIT, DIGITS):
        return pre_tokenizers.Digits(individual_digits=pattern == DIGIT)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _named(names: str, *patterns: str, **options: bool) -> dict[str, Splitting]:
    return dict.fromkeys(names.split(), Splitting(patterns, **options))


# The first of several names for one way is the one that is written.
SPLITTINGS: dict[str, Splitting] = {
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        LLAMA3,
        ignore_merges=True,
        add_bos=True,
    ),
    **_named("glm4 glm5", LLAMA3, ignore_merges=True),
    **_named("smaug-bpe dbrx chatglm-bpe", LLAMA3),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", QWEN2),
    **_named(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 "
        "mpt olmo jais trillion granite-docling jina-v1-en jina-v2-code roberta-bpe",
        GPT2,
    ),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", DIGIT, GPT2),
    **_named("tekken", _cased(DIGIT, ""), ignore_merges=True, add_bos=True),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", GPT4O),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", THREE_DIGITS, EAST_ASIAN, DEEPSEEK3),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT),
    **_named("viking", BLOOM, DIGIT),
    **_named("minicpm5", THREE_DIGITS, _words(DIGITS), ignore_merges=True),
    **_named("ufakzeka", QWEN2.removeprefix(f"{CONTRACTIONS}|")),
    **_named(
        "seed-coder",
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",
    ),
    **_named("superbpe", DIGITS, r"(?=(\d{3})+(?!\d))"),
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),
}


def patterns_of(splitter: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return the patterns of a pre-tokenizer as `tokenizer.json` says it, None for one that is no list of
    them.

    A ByteLevel step that puts a space in front is none: llama.cpp never does for byte-level tokenizers.
    """
    parts = (splitter or {}).get("pretokenizers", [splitter or {}])
    patterns = []
    for part in parts:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [GPT2] if part.get("use_regex", True) else []
            case {"type": "Digits"}:
                patterns.append(DIGIT if part["individual_digits"] else DIGITS)
            # "Removed, inverted" keeps the matches and drops what lies between: nothing, for these patterns.
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern} | {
                "type": "Split",
                "behavior": "Removed",
                "invert": True,
                "pattern": pattern,
            }:
                patterns.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
            case _:
                return None
    return tuple(patterns)

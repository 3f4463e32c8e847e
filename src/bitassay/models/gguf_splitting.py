"""How a byte-level tokenizer splits text before its merges apply, by the names that GGUF files give.

A GGUF file says it in one word, `tokenizer.ggml.pre`. The names are those of llama.cpp (src/llama-vocab.cpp,
July 2026), the patterns those of the tokenizers that the names stand for, in their order: each pattern cuts
the pieces that the one before it left, and both what matches and what lies between becomes a piece. Where
llama.cpp says that it approximates a published pattern, because its engine has no case-insensitive groups
and no classes of letter case, the published one stands here.

Left out, and refused by name: `whitespace` and the DNA tokenizers, which are no byte-level ones.
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


def _words(number: str, spaces: str = SPACES) -> str:
    """GPT-4's pattern (cl100k) with `number` for its digits."""
    return rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}|{MARKS}[\r\n]*|{spaces}"


def _cased(number: str, contractions: str, letters: str = "", end: str = r"[\r\n/]*") -> str:
    """GPT-4o's pattern (o200k): words end where upper case begins. `letters` narrows the letter classes."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{letters}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{letters}]"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contractions}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contractions}|{number}|{MARKS}{end}|{SPACES}"
    )


LLAMA3, QWEN2 = _words(THREE_DIGITS), _words(DIGIT)
GPT4O = _cased(THREE_DIGITS, f"{CONTRACTIONS}?")
CASCADE = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
EAST_ASIAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
DEEPSEEK3 = (
    rf"{ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-"
    "\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    "\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-"
    "\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-"
    "\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-"
    "\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)


@dataclass(frozen=True)
class Splitting:
    """The patterns of a name. `ignore_merges`: a piece that is a token becomes it, whatever the merges say.
    `add_bos`: what holds where the file does not say. `byte_level`: tokens are spelt in GPT-2's bytes; if
    not, in characters, with `▁` for the space, and what is unknown falls back to bytes."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True

    def pre_tokenizer(self) -> PreTokenizer:
        """Return the splitter of `tokenizers` that does this."""
        # ByteLevel's own regex is the published spelling of GPT2, and of a last step that is this.
        *steps, last = self.patterns
        plain = last == GPT2 and self.byte_level
        parts = [_step(pattern) for pattern in (steps if plain else self.patterns)]
        if self.byte_level:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
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
    **_named("granite-embed-multi-97m", GPT4O, ignore_merges=True),
    **_named("tiny_aya cohere2moe", r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", THREE_DIGITS, EAST_ASIAN, DEEPSEEK3),
    **_named(
        "spark2_5", THREE_DIGITS, EAST_ASIAN, DEEPSEEK3.replace(r"+[\r\n]*|\s*[\r\n]+", r"+|[\r\n]"), DIGIT
    ),
    **_named(
        "deepseek-llm",
        r"[\r\n]",
        DEEPSEEK_LETTERS,
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        IDEOGRAPHS,
        DIGITS,
    ),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **_named("bloom gpt3-finnish poro-chat", BLOOM),
    **_named("viking", BLOOM, DIGIT),
    **_named("jais-2", _words(THREE_DIGITS, rf"\s*[\r\n]+|{CASCADE}")),
    **_named("qwen35", QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")),
    **_named("minicpm5", THREE_DIGITS, _words(DIGITS), ignore_merges=True),
    **_named("ufakzeka", QWEN2.removeprefix(f"{CONTRACTIONS}|")),
    **_named("laguna", r"[^\n]+|[\n]+", QWEN2),
    **_named(
        "bailingmoe bailingmoe2 llada-moe",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_named(
        "seed-coder",
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",
    ),
    **_named(
        "exaone-moe",
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        rf"|{MARKS}[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_named("youtu", YOUTU_SCRIPTS, _cased(DIGIT, f"{CONTRACTIONS}?"), ignore_merges=True),
    **_named("superbpe", DIGITS, r"(?=(\d{3})+(?!\d))"),
    **_named("afmoe", FROM_THE_RIGHT, AFMOE_SCRIPTS, DEEPSEEK3),
    **_named(
        "kimi-k2", r"[\p{Han}]+|" + _cased(THREE_DIGITS, f"{CONTRACTIONS}?", r"&&[^\p{Han}]", end=r"[\r\n]*")
    ),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
        add_bos=True,
    ),
    **_named("gemma4 granite-embed-multi-311m", r"[^\n]+|[\n]+", byte_level=False, add_bos=True),
    **_named("sarvam-moe", r"[^\n]+|[\n]+", byte_level=False),
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),
}


def patterns_of(splitter: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return the patterns of a pre-tokenizer of `tokenizer.json`, None for one that is no list of them. A
    ByteLevel step that puts a space in front is none: llama.cpp never does for byte-level tokenizers."""
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

"""What llama.cpp makes of tricky strings, for every way to split text that it knows by name.

`python tests/gguf_reference.py` writes `gguf_reference.json` anew; it needs llama-cpp-python, which
the tests do not. The vocabulary is made so that every split shows: its merges were learned from the strings
themselves, unsplit, so whatever is not split apart is joined.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import bitassay
from bitassay.models.gguf_splitting import SPLITTINGS

TABLE = Path(__file__).with_name("gguf_reference.json")
STORIES = Path(bitassay.__file__).parent / "testing" / "stories260k"
CONTROL, USER_DEFINED = "<|control|>", "<user>"
TRICKY = (
    "",
    " ",
    "\n",
    "plain words",
    " leading and trailing ",
    "   three spaces   between   words   ",
    "\ttab\t\ttabs \t mixed",
    "one\n\ntwo\n \n three\r\nfour\r\r\n",
    "trailing newlines\n\n\n",
    "1 12 123 1234 12345 123456 1234567",
    "3.14 1,000,000 12:30 v2.0b1 x86_64 0x1F",
    "a1b22c333d4444",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969\u096a \u2160\u2161 \u00bd\u00b2",
    "I've you're he'll she'd we'm it's don't",
    "I'VE YOU'RE HE'LL SHE'D IT'S DON'T 'Tis 'RE",
    "\u2019s curly it\u2019s",
    "CamelCase HTTPServer iPhone eBay XMLHttp",
    "\u00c9t\u00c9 \u00c0B\u00c7d \u041f\u0440\u0438\u0432\u0415\u0442 \u0391\u03b2\u0393",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber stra\u00dfe",
    "\u4f60\u597d\u4e16\u754c\uff0c\u8fd9\u662f\u6d4b\u8bd5\u3002123\u4e2aabc",
    "\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca\u6f22\u5b57",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u3131\u3134",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645\u060c \u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f680 \U0001f636\u200d\U0001f32b\ufe0f \u2705\U0001f999\U0001f999 \U0001f1e9\U0001f1ea",
    "e\u0301\u0302 a\u0308o\u0308 \u0301alone",
    "def f(x):\n    return x**2 + 1  # note\n\n\nclass A:\n\tpass",
    "if (a!=b && c<=d) { e[i++] = '\\0'; } // end",
    "path/to/file.txt http://a.b/c?d=e&f#g",
    "a.b.c... wait!!! what??? -- --- ====",
    '"quoted" (paren) [brack] {brace} `tick` $5 100% a+b=c ^~|',
    "x\u00a0y\u2003z\u3000w",
    "zero\u200bwidth\u200djoin",
    "_under_score__ __init__ -dash-",
    f"a{CONTROL}b {CONTROL} c{CONTROL}",
    f"a{USER_DEFINED}b {USER_DEFINED} c",
    "ends with space ",
    "a  b   c    d     e        f",
    "\n\n  indented\n    more\n",
    "Mr. O'Neil's 2nd, 3rd & 21st.",
)


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges learned from the strings, unsplit."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2400,
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>", CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Halves too, so that pieces of a string are joined as well as the whole.
    plain = [text.replace(CONTROL, "").replace(USER_DEFINED, "") for text in TRICKY]
    texts = [part for text in plain for part in (text, *text.split(" "), *text.split("\n"))]
    learner.train_from_iterator(texts, trainer)
    content = json.loads(learner.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    return [*tokens, USER_DEFINED], [" ".join(pair) for pair in content["merges"]]


def fields(name: str, tokens: list[str], merges: list[str]) -> dict[str, Any]:
    """The keys of a file whose text is split as `name` says."""
    types = {"<unk>": TokenType.UNKNOWN, CONTROL: TokenType.CONTROL, USER_DEFINED: TokenType.USER_DEFINED}
    types |= dict.fromkeys(("<s>", "</s>"), TokenType.CONTROL)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(types.get(token, TokenType.NORMAL)) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_fields(space: bool) -> dict[str, Any]:
    """The keys of a file with stories260k's tokenizer, in which a text begins with a space or not."""
    content = json.loads((STORIES / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), CONTROL, USER_DEFINED]
    types = {"<unk>": TokenType.UNKNOWN, CONTROL: TokenType.CONTROL, USER_DEFINED: TokenType.USER_DEFINED}
    types |= dict.fromkeys(("<s>", "</s>"), TokenType.CONTROL)
    types |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [int(types.get(token, TokenType.NORMAL)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": space,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_vocabulary(path: Path, keys: Mapping[str, Any]) -> None:
    """A GGUF file with a tokenizer and no weights."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def llama_cpp_ids(path: Path, texts: tuple[str, ...], add_special: bool = False) -> list[list[int]]:
    """The ids that llama.cpp gives."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=add_special, special=True) for text in texts]


def main(scratch: Path) -> None:
    tokens, merges = vocabulary()
    rows: list[list[list[int]]] = []
    which: dict[str, int] = {}
    for name, splitting in SPLITTINGS.items():
        if not splitting.byte_level:
            continue
        path = scratch / f"{name}.gguf"
        write_vocabulary(path, fields(name, tokens, merges))
        ids = llama_cpp_ids(path, TRICKY)
        path.unlink()
        if ids not in rows:
            rows.append(ids)
        which[name] = rows.index(ids)
    spaced = {}
    for space in (True, False):
        write_vocabulary(scratch / "spm.gguf", sentencepiece_fields(space))
        spaced[str(space)] = llama_cpp_ids(scratch / "spm.gguf", TRICKY)
        (scratch / "spm.gguf").unlink()
    content = {"tokens": tokens, "merges": merges, "row_of": which, "rows": rows, "spaced": spaced}
    TABLE.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

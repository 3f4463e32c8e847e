"""What a host may do instead of what it sells, by words: suspects of `suspects.py`.

w8, fp8, recipe.yaml     the weights quantized by a recipe
kv8, kv4                 keys and values of the cache in 8 or 4 bits
system=FILE              the file's text as system prompt; system= an empty one
template=FILE            another chat template (Jinja)
context=N, context=N%    only the last N tokens, or N % of the tokens, of the prompt are read
temperature=X, top_p=X   another way of sampling than was asked for
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitassay.audit.asking import Asking, Text
from bitassay.audit.surprise import ASKED, Rule
from bitassay.audit.suspects import Suspect
from bitassay.errors import BitassayError
from bitassay.quantization.inputs.kv_cache import KvCache, round_cache
from bitassay.record.files import explained

CACHES: dict[str, Literal["int8", "int4"]] = {"kv8": "int8", "kv4": "int4"}
SETTINGS = ("system", "template", "context", "temperature", "top_p")
FILE_BYTES = 2**16
Load = Callable[[str | None], PreTrainedModel]


def is_recipe(word: str) -> bool:
    """Return whether a word names a recipe, not another change."""
    return word not in CACHES and word.partition("=")[0] not in SETTINGS


def suspect(word: str, load: Load) -> Suspect:
    """Return the suspect that a word names. load: returns the model in bfloat16, quantized by a recipe where
    one is named. Raises BitassayError for a value that is none, and a file that cannot be read."""
    if is_recipe(word):
        return Suspect(load=partial(load, word))
    if word in CACHES:
        return Suspect(load=partial(_with_cache, load, CACHES[word]))
    name, _, value = word.partition("=")
    match name:
        case "system":
            return Suspect(prompt=partial(_with_system, _text(value) if value else None))
        case "template":
            return Suspect(prompt=partial(_with_template, _text(value)))
        case "context":
            return Suspect(prompt=partial(_cut, *_size(value)))
        case "temperature":
            return Suspect(rule=Rule(_number(word, value, 100), ASKED.top_p))
    return Suspect(rule=Rule(ASKED.temperature, _number(word, value, 1)))


def _with_cache(load: Load, form: Literal["int8", "int4"]) -> PreTrainedModel:
    model = load(None)
    round_cache(model, KvCache(format=form, scale_dtype="float32"))
    return model


def _with_system(
    system: str | None, words: PreTrainedTokenizerBase, asking: Asking, text: Text, ids: Sequence[int]
) -> list[int]:
    """The prompt with another system prompt: in the chat template, else in front, behind a token that begins
    every text."""
    if asking.form == "chat":
        messages = [{"role": "system", "content": system or ""}, {"role": "user", "content": text.text}]
        return _rendered(words, messages, None)
    if system is None:
        return list(ids)
    first = 1 if ids and ids[0] == words.bos_token_id else 0
    return [*ids[:first], *words(f"{system}\n", add_special_tokens=False).input_ids, *ids[first:]]


def _with_template(
    template: str, words: PreTrainedTokenizerBase, asking: Asking, text: Text, ids: Sequence[int]
) -> list[int]:
    return _rendered(words, [{"role": "user", "content": text.text}], template)


def _rendered(
    words: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str | None
) -> list[int]:
    try:
        ids = words.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise BitassayError(f"the chat template cannot be used: {error!s:.200}", "another one") from error
    return list(ids)  # type: ignore[arg-type]


def _cut(
    size: float,
    is_share: bool,
    words: PreTrainedTokenizerBase,
    asking: Asking,
    text: Text,
    ids: Sequence[int],
) -> list[int]:
    keep = max(round(len(ids) * size), 1) if is_share else int(size)
    return list(ids[-keep:])


def _text(path: str) -> str:
    """The text of a small file."""
    with explained(Path(path)):
        data = Path(path).read_bytes()
        if len(data) > FILE_BYTES:
            raise BitassayError(f"{path}: more than {FILE_BYTES} bytes", "a prompt or template")
        try:
            return data.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise BitassayError(f"{path}: not UTF-8", "a text file") from error


def _size(value: str) -> tuple[float, bool]:
    digits, is_share = value.removesuffix("%"), value.endswith("%")
    if not digits.isascii() or not digits.isdigit() or not 0 < int(digits) <= (100 if is_share else 10**9):
        raise BitassayError(f"context={value}: not a number of tokens", "context=64 or context=50%")
    return (int(digits) / 100, True) if is_share else (int(digits), False)


def _number(word: str, value: str, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise BitassayError(f"{word}: not a number above 0 and up to {most:g}", "such as temperature=0.8")
    return number

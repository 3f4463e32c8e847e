"""What an audit asks: texts that nobody can have prepared for, and the bodies of requests.

Texts are cut from a corpus at places that a seed draws. The seed is drawn afresh for each audit, so a host
cannot know which texts come, and cannot tell them from others'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from bitassay.audit.distance import Level
from bitassay.audit.surprise import ASKED
from bitassay.audit.wire import MOST_TOKENS, MOST_TOP, Id
from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError

LETTERS = 16  # characters that are cut for a token, so that there are enough
TRIES = 200
EXTRAS = {"return_token_ids": True, "return_tokens_as_token_ids": True}
LLAMACPP = {"cache_prompt": False}  # what was read before would change the numerics of what comes now
PLAIN = {"top_k": 0, "min_p": 0}  # llama.cpp's server would leave tokens out by these as well
UNNAMED = ("tokens", "text", "sampled")  # levels that need no log-probabilities, only tokens
Count = Annotated[int, Field(ge=0, le=2**16)]
Form = Literal["ids", "text", "chat"]
Through = Literal["prompt_logprobs", "echo", "generation"]


@dataclass(frozen=True)
class Text:
    """A text and its token ids, as the reference's tokenizer makes them."""

    text: Annotated[str, Field(max_length=2**20)]
    ids: Annotated[tuple[Id, ...], Field(max_length=MOST_TOKENS)]


@dataclass(frozen=True)
class Asking:
    """How a server is asked for one level of evidence. form: of the prompt; through: where the evidence is;
    k: most likely tokens at each position; prompt_tokens: of a prompt; new_tokens: of an answer; extras:
    whether it takes vLLM's fields; llamacpp: whether it is llama.cpp's server, which has its own fields."""

    level: Level
    form: Form
    through: Through
    k: Annotated[int, Field(ge=0, le=MOST_TOP)]
    prompt_tokens: Count
    new_tokens: Count
    extras: bool
    llamacpp: bool = False

    @property
    def positions(self) -> int:
        """Return at how many positions a full answer is judged."""
        return self.new_tokens if self.through == "generation" else self.prompt_tokens - 1

    def read_as(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the ids that a model reads to judge an answer of `tokens`, and from which on."""
        return ([*prompt], 1) if self.through != "generation" else ([*prompt, *tokens], len(prompt))


def texts(
    tokenizer: PreTrainedTokenizerBase, corpus_name: str, seed: Sequence[int], count: int, tokens: int
) -> list[Text]:
    """Return `count` different texts of `tokens` tokens. Raises BitassayError for a corpus that is too
    short."""
    source, draw = corpus(corpus_name), np.random.default_rng(list(seed))
    found: dict[tuple[int, ...], Text] = {}
    for _ in range(TRIES + 4 * count):
        start = int(draw.integers(len(source.text)))
        _, _, piece = source.text[start : start + LETTERS * (tokens + 16)].partition(" ")
        ids = tuple(tokenizer(piece, verbose=False).input_ids[:tokens])
        if len(ids) == tokens:
            said = str(tokenizer.decode(list(ids), skip_special_tokens=True))
            found.setdefault(ids, Text(said, ids))
        if len(found) == count:
            return list(found.values())
    raise BitassayError(
        f"{source.source}: too short for {count} texts of {tokens} tokens",
        "fewer requests, or a longer --text",
    )


def prompt_of(text: Text, form: Form, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that a server should read: those of the text, or of the message in the reference's
    chat template."""
    if form == "ids":
        return text.ids
    if form == "text":
        return tuple(tokenizer(text.text).input_ids)
    messages = [{"role": "user", "content": text.text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))  # type: ignore[arg-type]


def body_of(asking: Asking, model: str, text: Text, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request."""
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": asking.new_tokens}
    body |= EXTRAS if asking.extras else {}
    is_sampled, is_named = asking.level == "sampled", asking.extras or asking.level == "text"
    if is_sampled:
        body |= {"temperature": ASKED.temperature, "top_p": ASKED.top_p}
    if asking.llamacpp:
        body |= LLAMACPP | (PLAIN if is_sampled else {})
    if asking.form == "chat":
        body["messages"] = [{"role": "user", "content": text.text}]
        if asking.level not in UNNAMED or not is_named:
            body |= {"logprobs": True, "top_logprobs": asking.k}
        return "/chat/completions", body | changes
    body["prompt"] = list(text.ids) if asking.form == "ids" else text.text
    if asking.through == "prompt_logprobs":
        body["prompt_logprobs"] = asking.k
    elif asking.level not in UNNAMED or not is_named:
        body["logprobs"] = asking.k
    if asking.through == "echo":
        body["echo"] = True
    return "/completions", body | changes

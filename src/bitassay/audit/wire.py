"""What servers answer, in one form: token ids and log-probabilities by position.

Three spellings are read: OpenAI's completions (lists side by side), OpenAI's chat (an entry a token, which
llama.cpp uses for completions too and adds `id`), and vLLM's `prompt_logprobs`. Tokens are named by id where
the server can (`token_id:12`, `id`), else by a text that only one token has. Everything is checked: types,
finite numbers, ids inside the vocabulary, log-probabilities not above 0.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from bitassay.audit.client import AnswerError
from bitassay.models.config import read_config
from bitassay.models.identity import Identity
from bitassay.models.load import read_tokenizer
from bitassay.models.source import resolve
from bitassay.record.progress import Progress, silent
from bitassay.verification.container import first_defect

MOST_TOKENS, MOST_TOP = 2**16, 2**10
ABOVE_ZERO = 1e-3  # by which rounding may lift a log-probability
_ID = re.compile(r"token_id:(\d{1,9})")
Number = Annotated[float, Field(allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_TOKENS)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Logprob = Annotated[float, Field(le=ABOVE_ZERO, allow_inf_nan=False)]
Top = Annotated[tuple[tuple[Id, Logprob], ...], Field(max_length=MOST_TOP)]


class Part(BaseModel):
    """A part of a JSON value from elsewhere: fields that are not known are ignored, types not converted."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Top(Part):
    token: str
    logprob: Number
    id: int | None = None


class _Entry(_Top):
    top_logprobs: Annotated[list[_Top], Field(max_length=MOST_TOP)] = []


class _Ranked(Part):
    logprob: Number


class _Logprobs(Part):
    content: Annotated[list[_Entry], Field(max_length=MOST_TOKENS)] | None = None
    tokens: Annotated[list[str], Field(max_length=MOST_TOKENS)] | None = None
    token_logprobs: Annotated[list[Number | None], Field(max_length=MOST_TOKENS)] | None = None
    top_logprobs: Annotated[list[dict[str, Number] | None], Field(max_length=MOST_TOKENS)] | None = None


_Prompt = Annotated[list[dict[str, _Ranked] | None], Field(max_length=MOST_TOKENS)]


class _Message(Part):
    content: str | None = None


class _Choice(Part):
    text: str | None = None
    message: _Message | None = None
    logprobs: _Logprobs | None = None
    token_ids: Ids | None = None
    prompt_token_ids: Ids | None = None
    prompt_logprobs: _Prompt | None = None


class _Usage(Part):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Receipt(Part):
    content: Annotated[str, Field(max_length=2**22)]


class _Body(Part):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=8)]
    usage: _Usage | None = None
    system_fingerprint: Annotated[str, Field(max_length=512)] | None = None
    prompt_logprobs: _Prompt | None = None
    receipt: _Receipt | None = None


@dataclass(frozen=True)
class Position:
    """What a server says of one token: its log-probability (None: not said) and those of most likely ones."""

    token: Id
    logprob: Logprob | None = None
    top: Top = ()


@dataclass(frozen=True)
class Answered:
    """An answer. output: None where the tokens cannot be told. prompt: positions of the prompt from its
    second token on; None where the server does not say."""

    text: str
    output: tuple[Position, ...] | None
    prompt: tuple[Position, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    fingerprint: str | None
    receipt: str | None


class Vocabulary:
    """The reference's token ids, and the texts that belong to one of them alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    @cached_property
    def by_text(self) -> dict[str, int]:
        """Return the id of every text that one token alone has."""
        texts: dict[str, list[int]] = {}
        for token in range(min(self.size, len(self.tokenizer))):
            texts.setdefault(str(self.tokenizer.decode([token])), []).append(token)
        return {text: ids[0] for text, ids in texts.items() if len(ids) == 1}

    def checked(self, token: int) -> int:
        """Return the id. Raises AnswerError where the vocabulary has none such."""
        if not 0 <= token < self.size:
            raise AnswerError(
                "outside-vocabulary", f"token id {token} is not in the vocabulary of {self.size}"
            )
        return token

    def named(self, text: str, ident: int | None = None) -> int | None:
        """Return the id of a token that a server names; None where that is ambiguous."""
        if ident is not None:
            return self.checked(ident)
        found = _ID.fullmatch(text)
        return self.checked(int(found[1])) if found else self.by_text.get(text)


def read_answer(
    value: Any, vocabulary: Vocabulary, prompt_ids: Sequence[int], echoed: bool = False
) -> Answered:
    """Return the answer in a JSON value that may come from anyone. echoed: the log-probabilities begin with
    those of the prompt. Raises AnswerError."""
    try:
        body = _Body.model_validate(value)
    except ValidationError as error:
        defect = first_defect(error)
        code = "not-finite" if "finite" in defect else "malformed"
        raise AnswerError(code, f"the answer is not what was asked for: {defect}") from error
    choice, usage = body.choices[0], body.usage or _Usage()
    said = _positions(choice.logprobs, vocabulary) if choice.logprobs else None
    prompt = _prompt(choice.prompt_logprobs or body.prompt_logprobs, vocabulary, prompt_ids)
    if echoed and said is not None:
        given, said = said[: len(prompt_ids)], said[len(prompt_ids) :]
        if [each.token for each in given if each] != list(prompt_ids):
            raise AnswerError("other-prompt", "the prompt that the server echoes is not the one it was given")
        prompt = tuple(each for each in given[1:] if each)
    output = None if said is None or None in said else tuple(each for each in said if each)
    if choice.token_ids is not None:
        ids = [vocabulary.checked(token) for token in choice.token_ids]
        if said is not None and len(said) != len(ids):
            raise AnswerError("malformed", f"{len(said)} log-probabilities for {len(ids)} tokens")
        named = said or [None] * len(ids)
        if any(each and each.token != token for each, token in zip(named, ids, strict=True)):
            raise AnswerError("malformed", "log-probabilities of other tokens than those of the answer")
        output = tuple(each or Position(token) for each, token in zip(named, ids, strict=True))
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != list(prompt_ids):
        raise AnswerError("other-prompt", "the server read other tokens than those it was given")
    text = choice.text if choice.text is not None else (choice.message or _Message()).content
    return Answered(
        text or "",
        output,
        prompt,
        usage.prompt_tokens,
        usage.completion_tokens,
        body.system_fingerprint,
        body.receipt and body.receipt.content,
    )


def names_ids(value: Any) -> bool:
    """Return whether the entries of an answer's log-probabilities have a field `id`, as llama.cpp's server
    writes them."""
    try:
        return isinstance(value["choices"][0]["logprobs"]["content"][0]["id"], int)
    except (TypeError, LookupError):
        return False


def _positions(logprobs: _Logprobs, vocabulary: Vocabulary) -> list[Position | None]:
    """One position for each token, None where the token cannot be told."""
    if logprobs.content is not None:
        return [
            _position(
                vocabulary.named(entry.token, entry.id),
                entry.logprob,
                [(vocabulary.named(top.token, top.id), top.logprob) for top in entry.top_logprobs],
            )
            for entry in logprobs.content
        ]
    tokens, values = logprobs.tokens or [], logprobs.token_logprobs or []
    tops = logprobs.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise AnswerError("malformed", "lists of log-probabilities of different lengths")
    return [
        _position(
            vocabulary.named(token),
            value,
            [(vocabulary.named(text), each) for text, each in (top or {}).items()],
        )
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _prompt(
    listed: Sequence[dict[str, _Ranked] | None] | None, vocabulary: Vocabulary, prompt_ids: Sequence[int]
) -> tuple[Position, ...] | None:
    if listed is None:
        return None
    if len(listed) != len(prompt_ids):
        raise AnswerError("malformed", f"{len(listed)} positions for a prompt of {len(prompt_ids)} tokens")
    positions = []
    for token, ranked in zip(prompt_ids[1:], listed[1:], strict=True):
        values = {vocabulary.checked(_integer(name)): each.logprob for name, each in (ranked or {}).items()}
        if token not in values or len(values) > MOST_TOP:
            raise AnswerError("malformed", "a position of the prompt without its own token's log-probability")
        positions.append(_position(token, values[token], list(values.items())))
    return tuple(each for each in positions if each)


def _position(
    token: int | None, logprob: float | None, top: Sequence[tuple[int | None, float]]
) -> Position | None:
    values = {each: value for each, value in top if each is not None}
    for value in (*values.values(), *([] if logprob is None else [logprob])):
        if value > ABOVE_ZERO:
            raise AnswerError("above-zero", f"a log-probability of {value:g}")
    return None if token is None else Position(token, logprob, tuple(values.items()))


def _integer(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise AnswerError("malformed", f"{text!r:.40} is not a token id")
    return int(text)


def words_of(
    model: str, progress: Progress = silent, *, trust_remote_code: bool = False
) -> tuple[Vocabulary, str]:
    """Return the vocabulary of a model that `bitassay.load` finds, and the digest of its tokenizer. Raises
    BitassayError where there is none."""
    source = resolve(model, progress)
    config = read_config(source.folder, trust_remote_code=trust_remote_code).get_text_config()
    tokenizer = read_tokenizer(source.folder, trust_remote_code)
    size = max(int(config.vocab_size), len(tokenizer))
    return Vocabulary(tokenizer, size), Identity(source).tokenizer_digest

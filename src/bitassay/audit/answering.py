"""Answer one request: generate token by token, cut at stop texts, sign, keep, and only then say that it is
done.

Log-probabilities are the model's own, before temperature and top-p, in nats. Of the prompt they are computed
by one forward over it. A request that generates nothing (`max_tokens` 0) is signed as one of a single token,
which the client does not get.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.audit.requests import Chat, Completion, Refused
from bitassay.audit.store import Store
from bitassay.engines.engine import engine_of
from bitassay.engines.stream import Stream
from bitassay.engines.taps import tap_layers
from bitassay.models.identity import Identity, identity, tokenizer
from bitassay.models.positions import context_length
from bitassay.models.precision import exact
from bitassay.verification.numerics import numerics
from bitassay.verification.receipts.receipt import Receipt
from bitassay.verification.trace import Header, ModelClaim, Sampling, Trace

LEAST = -9999.0  # stands for minus infinity, which JSON has not
BEFORE = 4  # tokens of the prompt before which the text of an answer is decoded
ROWS = 64  # positions whose log-probabilities exist at a time


@dataclass(frozen=True)
class Entry:
    """One position's log-probabilities: of its token, whose rank among all counts from 1, and of the most
    likely ones as (token, log-probability)."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one token adds: itself, the text that is certain by now, and its log-probabilities."""

    token: int
    text: str
    entry: Entry | None


@dataclass(frozen=True)
class Read:
    """The prompt, before anything is generated."""

    ids: tuple[int, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Done:
    """The end of an answer, whose receipt is on the disk."""

    finish: str
    receipt: Receipt
    generated: int


@dataclass(frozen=True)
class Served:
    """What a server serves. claim: the identity that it states, where it is not the model's own."""

    model: PreTrainedModel
    store: Store
    name: str
    max_context: int
    max_logprobs: int = 20
    claim: Identity | None = None


def answer(served: Served, asked: Completion | Chat) -> Iterator[Read | Piece | Done]:
    """Yield the prompt, then each token, then the end. Raises Refused and other BitassayErrors before the
    first of these, for what cannot be answered."""
    model, store = served.model, served.store
    store.check_room()
    if max(asked.alternatives or 0, asked.prompt_logprobs or 0) > served.max_logprobs:
        raise Refused(f"more than {served.max_logprobs} log-probabilities for a position", "ask for fewer")
    prompt = prompt_ids(model, asked)
    room = served.max_context - len(prompt)
    new_tokens = asked.new_tokens if asked.new_tokens is not None else max(room, 1)
    if new_tokens > room:
        raise Refused(
            f"{len(prompt)} tokens of the prompt and {new_tokens} new ones do not fit {served.max_context}",
            "shorten the prompt or ask for fewer tokens",
        )
    sampler = asked.sampler(secrets.randbelow(2**63))
    stream = Stream(
        model,
        prompt,
        max_new_tokens=max(new_tokens, 1),
        sampler=sampler,
        nonce=asked.nonce,
        layers=tap_layers(model),
    )
    wanted = _prompt_alternatives(asked)
    yield Read(prompt, () if wanted is None else tuple(prompt_entries(model, prompt, wanted)))
    text = TextSoFar(model, prompt, asked.stops)
    finish = "length"
    for index in range(max(new_tokens, 1)):
        step = stream.step()
        if new_tokens:
            held = text.add(step.token, is_last=step.is_end or index + 1 == new_tokens)
            known = asked.alternatives
            entry = None if known is None else entries_of(step.logits[None], [step.token], known)[0]
            yield Piece(step.token, held, entry)
        if step.is_end or text.stopped:
            finish = "stop"
            break
    yield Done(
        finish,
        store.keep(_trace(served, prompt, stream, text.stopped)),
        len(stream.output_ids) if new_tokens else 0,
    )


def _trace(served: Served, prompt: tuple[int, ...], stream: Stream, stopped: bool) -> Trace:
    """The trace of what was generated. A text that a stop ended is signed as one for which no more tokens
    were asked: a verifier cannot know where a stop lies."""
    generation = stream.generation
    model, count = served.model, len(generation.output_ids)
    header = Header(
        model=ModelClaim.of(served.claim or identity(model)),
        numerics=numerics(model),
        sampling=Sampling.of(stream.sampler, count if stopped else stream.max_new_tokens),
        nonce=stream.nonce,
        prompt_ids=prompt,
        output_ids=generation.output_ids,
        layers=stream.layers,
        positions=tuple(range(len(prompt) + count - 1)),
    )
    return Trace(header, generation.states)


def prompt_ids(model: PreTrainedModel, asked: Completion | Chat) -> tuple[int, ...]:
    """Return the token ids of a request's prompt. Raises Refused."""
    tokens = tokenizer(model)
    if isinstance(asked, Completion):
        prompt = asked.one_prompt
        if not isinstance(prompt, str):
            return tuple(prompt)
        return tuple(tokens(prompt, add_special_tokens=bool(asked.add_special_tokens)).input_ids)
    if not getattr(tokens, "chat_template", None):
        raise Refused("this model has no chat template", "/v1/completions")
    messages = [message.as_given for message in asked.messages]
    try:
        ids = tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, KeyError) as error:  # templates refuse orders of roles
        raise Refused(f"the chat template does not take these messages: {error!s:.200}") from error
    return tuple(ids)  # type: ignore[arg-type]


def _prompt_alternatives(asked: Completion | Chat) -> int | None:
    if asked.prompt_logprobs is not None:
        return asked.prompt_logprobs
    return asked.alternatives if isinstance(asked, Completion) and asked.echo else None


def prompt_entries(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[Entry]:
    """Return the log-probabilities of every token of a prompt but the first."""
    if len(prompt) < 2:
        return []
    (read,) = engine_of(model).prefill([prompt[:1]], [prompt[1:]])
    return entries_of(read.logits, prompt[1:], count)


def entries_of(
    logits: Float[Tensor, "positions vocabulary"], tokens: Sequence[int], count: int
) -> list[Entry]:
    """Return the log-probabilities of `tokens`, and of the `count` most likely ones beside each."""
    entries = []
    for start in range(0, len(tokens), ROWS):
        rows = exact(logits[start : start + ROWS]).log_softmax(-1)
        best = rows.topk(min(count, rows.shape[-1]))
        for row, token, values, ids in zip(
            rows, tokens[start : start + ROWS], best.values.tolist(), best.indices.tolist(), strict=True
        ):
            top = tuple((each, max(value, LEAST)) for each, value in zip(ids, values, strict=True))
            rank = 1 + int((row > row[token]).sum())
            entries.append(Entry(token, max(float(row[token]), LEAST), rank, top))
    return entries


class TextSoFar:
    """The text of a growing list of tokens, and where a stop text ends it. What may be the beginning of a
    stop, or of a letter of several tokens, is held back."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokens, self.stops, self.stopped = tokenizer(model), stops, False
        self._ids = list(prompt[-BEFORE:])  # a tokenizer may drop the space of a text's first token
        self._begin, self._read, self._sent = 0, len(self._ids), 0
        self._text = ""

    def add(self, token: int, is_last: bool) -> str:
        """Return what can be sent now that there is one more token."""
        self._ids.append(token)
        known = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if is_last or (len(text) > len(known) and not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self._text += text[len(known) :]
            self._begin, self._read = self._read, len(self._ids)
        found = [at for stop in self.stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            held = 0 if is_last else max((len(stop) - 1 for stop in self.stops), default=0)
            end = max(self._sent, len(self._text) - held)
        sent, self._sent = self._sent, end
        return self._text[sent:end]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokens.decode(ids, skip_special_tokens=True))


def default_context(model: PreTrainedModel, most: int = 4096) -> int:
    """Return how many tokens prompt and answer may have together: what the model has positions for, at most
    `most`."""
    return min(context_length(model) or most, most)

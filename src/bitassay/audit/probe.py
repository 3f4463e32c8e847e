"""Find out which evidence a server gives, with a few short requests.

Nothing is believed that was not seen: a server that ignores a field has not answered it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bitassay.audit.asking import Asking, Form, Text, Through, body_of, prompt_of
from bitassay.audit.client import AGAIN, AnswerError, Target
from bitassay.audit.distance import LEVELS, Level
from bitassay.audit.wire import Answered, Vocabulary, names_ids, read_answer
from bitassay.errors import BitassayError

FEWER = (20, 5, 1, 0)
SEEN = 8  # tokens that a probe generates
FATAL = {"unreachable", "tls", "redirect", "timeout", "broken", "too-large", "status-401", "status-403"}
FATAL |= {f"status-{status}" for status in AGAIN if status != 500}
WORDS = {
    "prompt-logprobs": "top log-probabilities of given tokens",
    "logprobs": "top log-probabilities of generated tokens",
    "prompt-chosen": "log-probability of given tokens",
    "chosen": "log-probability of generated tokens",
    "tokens": "greedy tokens",
    "text": "greedy text",
    "sampled": "sampled tokens",
}


@dataclass(frozen=True)
class Probe:
    """askings: how to ask for each level that the server gives, the strongest first. rows: what was found, as
    a table. reads_others: the server says that it read other tokens than the prompt's."""

    askings: dict[Level, Asking]
    rows: list[dict[str, Any]]
    reads_others: bool = False

    def choose(self, level: Level | None, server: str = "the server") -> Asking:
        """Return how to ask for `level`, by default the strongest. server: what an error calls it. Raises
        BitassayError where it does not give that."""
        if level is None and self.askings:
            return next(iter(self.askings.values()))
        if level not in self.askings and self.reads_others:
            raise AnswerError(
                "other-prompt",
                f"{server} read other tokens than the reference makes of the prompt: another tokenizer, "
                "chat template or system prompt",
                "the --reference that was sold; without --chat, given token ids have no template",
            )
        if level not in self.askings:
            raise BitassayError(
                f"{server} does not give {WORDS[level] if level else 'any evidence that can be judged'}",
                f"--evidence {' or '.join(self.askings)}" if self.askings else "a server with token ids",
            )
        return self.askings[level]


def probe(
    target: Target,
    vocabulary: Vocabulary,
    text: Text,
    tokens: int,
    prompt_tokens: int,
    k: int,
    chat: bool = False,
) -> Probe:
    """Ask a server what it gives. text: a short one. tokens: how many positions a request is to have;
    prompt_tokens: of a prompt that is to be continued. chat: by messages alone. Raises AnswerError where it
    answers nothing."""
    tokenizer = vocabulary.tokenizer

    def ask(asking: Asking, **changes: Any) -> Answered | None:
        path, body = body_of(asking, target.model, text, **changes)
        try:
            ids, value = prompt_of(text, asking.form, tokenizer), target.endpoint.post(path, body)
            spellings.add(names_ids(value))
            return read_answer(value, vocabulary, ids, asking.through == "echo")
        except AnswerError as error:
            if error.code in FATAL:
                raise
            refused.append(error)
            return None

    refused: list[AnswerError] = []
    spellings: set[bool] = set()
    rows: list[dict[str, Any]] = []

    def row(what: str, given: bool, detail: str = "") -> None:
        rows.append({"evidence": what, "given": given, "detail": detail})

    base = next((one for one in _forms(tokenizer, chat) if ask(one) is not None), None)
    if base is None:
        code, said = refused[0].code, refused[0].problem.removesuffix(f" [{refused[0].code}]")
        is_other = code in ("malformed", "not-json", "wrong-type")
        hint = "the URL of the API, mostly with /v1 at its end" if is_other else refused[0].remedy
        url = target.endpoint.url
        raise AnswerError(code, said if url in said else f"{url}: {said}", hint)
    if ask(replace(base, level="chosen", k=1)) is not None and True in spellings:
        base = replace(base, extras=False, llamacpp=True)
    row("prompt as token ids", base.form == "ids", f"asked as {base.form}")
    askings: dict[Level, Asking] = {}
    tops: dict[str, int] = {}
    # llama.cpp's server has neither; it answers what it does not know with 500, which would be tried again.
    ways: tuple[Through, ...] = ("generation", "prompt_logprobs", "echo")
    if base.form == "chat" or base.llamacpp:
        ways = ("generation",)
    for through in ways:
        top, asking = _most(ask, base, through, k)
        tops[through] = top
        row(f"log-probabilities by {through}", top >= 0, f"top {top}" if top >= 0 else "")
        if top < 0 or (through == "echo" and "prompt-logprobs" in askings):
            continue
        given = through != "generation"
        sized = replace(
            asking,
            k=top,
            prompt_tokens=tokens + 1 if given else prompt_tokens,
            new_tokens=asking.new_tokens if given else tokens,
        )
        if top > 1:
            askings["prompt-logprobs" if given else "logprobs"] = sized
        level: Level = "prompt-chosen" if given else "chosen"
        askings.setdefault(level, replace(sized, level=level, k=min(top, 1)))
    known = replace(base, level="tokens", k=max(min(tops["generation"], 1), 0))
    first = ask(known) or ask(known := replace(known, level="text"))
    has_ids = first is not None and first.output is not None and len(first.output) > 0
    row("ids of generated tokens", has_ids)
    if has_ids:
        askings["tokens"] = replace(known, prompt_tokens=prompt_tokens, new_tokens=tokens)
        askings["sampled"] = replace(askings["tokens"], level="sampled")
    if first is not None and first.text.strip():
        askings["text"] = replace(known, level="text", prompt_tokens=prompt_tokens, new_tokens=tokens)
    row("temperature 0 repeats", _same(first, ask(known)))
    seeded = [ask(base, temperature=1.0, seed=seed) for seed in (7, 7)]
    row("seeds repeat", _same(*seeded))
    count = first.prompt_tokens if first else None
    own = len(prompt_of(text, base.form, tokenizer))
    row("counts prompt tokens as the reference", count == own, f"{count} and {own}")
    row(
        "system_fingerprint",
        bool(first and first.fingerprint),
        (first.fingerprint or "")[:60] if first else "",
    )
    reads_others = any(error.code == "other-prompt" for error in refused)
    if reads_others:
        row("reads the prompt that it is given", False, "its ids are others: template or system prompt")
    row("signed receipts", bool(first and first.receipt))
    found: dict[Level, Asking] = {
        level: replace(askings[level], level=level) for level in LEVELS if level in askings
    }
    return Probe(found, rows, reads_others)


def _forms(tokenizer: PreTrainedTokenizerBase, chat: bool) -> Iterator[Asking]:
    forms: list[Form] = [] if chat else ["ids", "text"]
    if getattr(tokenizer, "chat_template", None):
        forms.append("chat")
    elif chat:
        raise BitassayError("the reference's tokenizer has no chat template", "leave --chat out")
    for form in forms:
        for extras in (True, False):
            # Without extras, `tokens` asks for log-probabilities, which name tokens.
            yield Asking("tokens", form, "generation", 1, 0, SEEN, extras)
    for form in forms:
        yield Asking("text", form, "generation", 0, 0, SEEN, False)


def _most(ask: Any, base: Asking, through: Through, k: int) -> tuple[int, Asking]:
    """The most alternatives at each position that a server gives there; -1 without any log-probability."""
    level: Level = "logprobs" if through == "generation" else "prompt-logprobs"
    asking = replace(base, level=level, through=through)
    for new_tokens in {"generation": (SEEN,), "prompt_logprobs": (1,), "echo": (0, 1)}[through]:
        for fewer in dict.fromkeys(min(k, each) for each in FEWER):
            asking = replace(asking, k=fewer, new_tokens=new_tokens)
            answered = ask(asking)
            said = answered and (answered.output if through == "generation" else answered.prompt)
            if said and all(each.logprob is not None for each in said):
                return min(min(len(each.top) for each in said), fewer), asking
    return -1, asking


def _same(one: Answered | None, other: Answered | None) -> bool:
    return one is not None and other is not None and bool(one.text) and one.text == other.text

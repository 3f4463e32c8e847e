"""Which known change is nearest to what a server says? Answers are compared with what may have been served
instead: the reference quantized by a recipe or with a smaller cache, behind another prompt, or sampled in
another way.

Each suspect reads the tokens of each answer once, in bfloat16, as most servers compute. Two numbers are
given: the distance (`distance.py`) of the server's evidence from what the suspect says, and how much of the
suspect's change is seen. With d the server's log-probabilities less the control's, u the suspect's less the
control's, both centred and weighted at each position as in the distance,

    seen = sum w d u / sum w u^2

over all positions and answers: near 1 for the model that answers, near 0 for the reference, and for other
changes as far as they do not go the same way. Rounding noise is in no suspect's direction, so `seen` tells
changes that are smaller than it. Its interval is a jackknife over answers. Tokens alone have no `seen`. The
distance of sampled tokens is how unlikely the suspect finds each, -log of its probability, by its own rule of
sampling or the one that was asked for.

The nearest suspect is a hint, not a verdict: a change that is not among them may be nearer still.

`suspect` makes them of words:

    w8, fp8, recipe.yaml     the weights quantized by a recipe
    kv8, kv4                 keys and values of the cache in 8 or 4 bits
    system=FILE              the file's text as system prompt; system= an empty one
    template=FILE            another chat template (Jinja)
    context=N, context=N%    only the last N tokens, or N % of the tokens, of the prompt are read
    temperature=X, top_p=X   another way of sampling than was asked for
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitassay.audit.asking import UNNAMED, Asking, Text
from bitassay.audit.distance import CAP, Rows, distances
from bitassay.audit.session import Session, positions_of
from bitassay.audit.surprise import ASKED, Rule, unlikeliness
from bitassay.audit.wire import Position
from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import FEWEST, jackknife_of, student_interval
from bitassay.models.identity import identity
from bitassay.quantization.inputs.kv_cache import KvCache, round_cache
from bitassay.record.files import explained

Prompt = Callable[[PreTrainedTokenizerBase, Asking, Text, Sequence[int]], list[int]]


@dataclass(frozen=True)
class Suspect:
    """What a host may do instead. load: its model (None: the claimed one); prompt: of tokenizer, asking, text
    and prompt, the ids that it reads; rule: of sampling."""

    load: Callable[[], PreTrainedModel] | None = None
    prompt: Prompt | None = None
    rule: Rule | None = None


CACHES: dict[str, Literal["int8", "int4"]] = {"kv8": "int8", "kv4": "int4"}
SETTINGS = ("system", "template", "context", "temperature", "top_p")
FILE_BYTES = 2**16
Load = Callable[[str | None], PreTrainedModel]
NOBODY: Mapping[str, Suspect] = MappingProxyType({})
CLAIMED = "the model that was claimed"


def check_suspects(asking: Asking, suspects: Mapping[str, Suspect]) -> None:
    """Raise BitassayError for a suspect of which this evidence says nothing."""
    for name, suspect in suspects.items():
        if suspect.prompt is not None and asking.through != "generation":
            raise BitassayError(
                f"{name}: log-probabilities of given tokens say nothing of other prompts",
                "--evidence logprobs, chosen, tokens, text or sampled",
            )
        if suspect.rule is not None and asking.level != "sampled":
            raise BitassayError(f"{name}: greedy answers are not sampled", "--evidence sampled")


def compare(session: Session, asking: Asking, suspects: Mapping[str, Suspect]) -> list[dict[str, Any]]:
    """Return a row for each suspect and for the claimed model, the nearest first; none without suspects.
    Raises BitassayError for a suspect with another vocabulary."""
    numbers = [
        number
        for number in range(session.options.requests)
        if session.kept(f"score-0-{number:05d}").get("score") is not None
    ]
    if not suspects or not numbers:
        return []
    answers = [session.answer(0, number) for number in numbers]
    said = [positions_of(answer, asking) for answer in answers]
    texts = session.texts("audited", session.options.requests, asking.prompt_tokens)

    def read(model: PreTrainedModel, suspect: Suspect) -> list[tuple[float, list[np.ndarray]]]:
        """Of each answer the mean distance, and the model's values where the server has one."""
        found = []
        for number, answer, positions in zip(numbers, answers, said, strict=True):
            tokens, prompt = [each.token for each in positions], answer["prompt_ids"]
            if suspect.prompt is not None:
                prompt = suspect.prompt(session.tokenizer, asking, texts[number], prompt)
            ids, start = asking.read_as(prompt, tokens)
            rows = session.reference.rows(model, ids, start)
            if asking.level == "sampled":
                far = unlikeliness(tokens, rows, suspect.rule or ASKED)
            else:
                far = distances(asking.level, positions, rows, asking.k)
            found.append((float(far.mean()), values_of(positions, rows)))
        return found

    own = read(session.reference.control, Suspect())
    means, seen = {CLAIMED: [mean for mean, _ in own]}, {}
    for index, (name, suspect) in enumerate(suspects.items()):
        session.progress(f"comparing with {name}", index, len(suspects))
        model = session.reference.control if suspect.load is None else suspect.load()
        if identity(model).tokenizer_digest != identity(session.reference.exact).tokenizer_digest:
            raise BitassayError(f"{name}: has another tokenizer than the reference", "one of the same tokens")
        theirs = read(model, suspect)
        means[name] = [mean for mean, _ in theirs]
        sums = [
            _sums(positions, mine, other)
            for positions, (_, mine), (_, other) in zip(said, own, theirs, strict=True)
        ]
        seen[name] = (None, None) if asking.level in UNNAMED else share_seen(np.array(sums))
    table = np.array(list(means.values()))
    nearest = np.bincount(table.argmin(0), minlength=len(means))
    rows = [
        {"suspect": name, "distance": float(values.mean()), "nearest": int(count), "answers": len(answers)}
        | dict(zip(("seen", "seen_ci"), seen.get(name, (None, None)), strict=True))
        for name, values, count in zip(means, table, nearest, strict=True)
    ]
    return sorted(rows, key=lambda row: row["distance"])


def values_of(said: Sequence[Position], rows: Rows) -> list[Float64[np.ndarray, " listed"]]:
    """Return a model's log-probabilities of the tokens that a server lists, by position."""
    return [row[[*_listed(each)]] for each, row in zip(said, rows, strict=True)]


def share_seen(sums: Float64[np.ndarray, "answers 2"]) -> tuple[float | None, tuple[float, float] | None]:
    """Return `seen` of each answer's sums of w d u and w u^2, and its interval; None where a suspect says
    what the reference says."""
    upper, lower = sums.sum(0)
    without = sums.sum(0) - sums
    if not lower or not without[:, 1].all():
        return None, None
    value = float(upper / lower)
    if len(sums) < FEWEST:
        return value, None
    return value, student_interval(jackknife_of(value, (without[:, 0] / without[:, 1]).tolist()))


def _sums(
    said: Sequence[Position], claimed: Sequence[np.ndarray], suspect: Sequence[np.ndarray]
) -> tuple[float, float]:
    upper = lower = 0.0
    for each, r, q in zip(said, claimed, suspect, strict=True):
        if not len(r):
            continue
        d = (np.array([*_listed(each).values()], dtype=np.float64) - r).clip(-CAP, CAP)
        u, weights = (q - r).clip(-CAP, CAP), np.exp(r)
        if len(r) > 1:
            weights = weights / weights.sum() if weights.sum() else weights
            d, u = d - weights @ d, u - weights @ u
        else:
            weights = np.ones(1)
        upper, lower = upper + float(weights @ (d * u)), lower + float(weights @ u**2)
    return upper, lower


def _listed(said: Position) -> dict[int, float]:
    own = {} if said.logprob is None else {said.token: said.logprob}
    return dict(said.top) | own


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

"""Does an endpoint keep its contract? Counts, limits, stops, streams, the context, and calls of tools.

Each check is made of several requests, and its result is a rate with an exact interval (Clopper and Pearson).
Checks marked exact are broken by no honest numerics: one failure is a FAIL. The others depend on the model or
on rounding (two greedy answers need not be equal). They are decided beside a server that is known to be
honest: Fisher's exact test, one-sided, with Holm's correction over the checks; without one, nothing is
decided where one is not always kept.

    usage counts the prompt         usage.prompt_tokens is the number of tokens that the tokenizer makes
    usage counts the answer         usage.completion_tokens is the number of token ids of the answer
    max_tokens is kept              there are no more; exact
    the end has its reason          "stop" where there are fewer tokens; exact
    stop texts end the answer       with reason "stop", and are not in it; exact
    greedy answers repeat           the same request, asked twice
    streams say the same            the same request, streamed
    long prompts are taken          of 90 % of the context, and counted in full
    their beginning is read         another beginning changes the answer or its log-probabilities
    a tool is called                where the question needs it (the trigger's recall)
    no tool is called               where it does not
    arguments fit the schema        of the tools that are called: name, JSON, types, values
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import fisher_exact

from bitassay.audit.client import AnswerError
from bitassay.audit.wire import MOST_TOKENS, Vocabulary, read_answer
from bitassay.evaluation.statistics import clopper_pearson_interval, holm
from bitassay.verification.container import first_defect

Outcome = tuple[str, bool, str]  # which check, whether it was kept, what was wrong
EXACT = ("max_tokens is kept", "the end has its reason", "stop texts end the answer")
CHECKS = (
    "usage counts the prompt", "usage counts the answer", *EXACT, "greedy answers repeat",
    "streams say the same", "long prompts are taken", "their beginning is read", "a tool is called",
    "no tool is called", "arguments fit the schema",
)  # fmt: skip
UNITS = ("celsius", "fahrenheit")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city on one of the next days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days_ahead": {"type": "integer", "minimum": 0, "maximum": 7},
                "unit": {"type": "string", "enum": list(UNITS)},
            },
            "required": ["city", "days_ahead", "unit"],
            "additionalProperties": False,
        },
    },
}
CITIES = ("Paris", "Lagos", "Lima", "Osaka", "Oslo", "Quito", "Delhi", "Cairo")
OTHERS = ("What is 3 plus 4?", "Name a colour.", "Translate 'bread' into French.", "Who wrote Faust?")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Function(_Part):
    name: Annotated[str, Field(max_length=256)]
    arguments: Annotated[str, Field(max_length=2**16)]


class _Call(_Part):
    function: _Function


class _Said(_Part):
    content: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=64)] | None = None


class _Choice(_Part):
    text: str | None = None
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: Annotated[str, Field(max_length=64)] | None = None


class _Body(_Part):
    choices: Annotated[list[_Choice], Field(max_length=8)] = []


@dataclass(frozen=True)
class Said:
    """An answer as far as the checks read it. ids: of its tokens, None where they are not known; logprobs:
    all of the answer, as texts that can be compared; calls: of tools, as (name, arguments)."""

    text: str
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ids: tuple[int, ...] | None = None
    logprobs: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def said_in(value: Any, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> Said:
    """Return what an answer says. Raises AnswerError for what is none."""
    answered = read_answer(value, vocabulary, prompt_ids)
    (first, *_) = _checked(value).choices
    calls = (first.message and first.message.tool_calls) or []
    output = answered.output
    return Said(
        answered.text,
        first.finish_reason,
        answered.prompt_tokens,
        answered.completion_tokens,
        None if output is None else tuple(each.token for each in output),
        "" if output is None else repr([(each.logprob, each.top) for each in output]),
        tuple((call.function.name, call.function.arguments) for call in calls),
    )


def streamed_text(events: Sequence[Any]) -> tuple[str, str | None]:
    """Return the text of a streamed answer, and why it ended. Raises AnswerError."""
    text, finish = "", None
    for event in events:
        for choice in _checked(event).choices[:1]:
            text += choice.text or (choice.delta and choice.delta.content) or ""
            finish = choice.finish_reason or finish
        if len(text) > 64 * MOST_TOKENS:
            raise AnswerError("too-large", "a streamed text without end")
    return text, finish


def _checked(value: Any) -> _Body:
    try:
        return _Body.model_validate(value)
    except ValidationError as error:
        raise AnswerError("malformed", f"not an answer: {first_defect(error)}") from error


def check_answer(said: Said, prompt_tokens: int, max_tokens: int) -> list[Outcome]:
    """Return what one answer keeps: its counts, its limit, the reason of its end."""
    count = said.completion_tokens if said.ids is None else len(said.ids)
    found = [_equal("usage counts the prompt", said.prompt_tokens, prompt_tokens)]
    if said.ids is not None:
        found.append(_equal("usage counts the answer", said.completion_tokens, len(said.ids)))
    if count is not None:
        problem = f"{count} tokens where {max_tokens} were asked for"
        found.append(_outcome("max_tokens is kept", count <= max_tokens, problem))
        right = said.finish in (("stop", "length") if count >= max_tokens else ("stop", "tool_calls"))
        problem = f"{said.finish!r} after {count} of {max_tokens} tokens"
        found.append(_outcome("the end has its reason", right, problem))
    return found


def stop_in(text: str) -> str | None:
    """Return a piece of a text to stop at: four characters of its middle; None of a short one."""
    start = len(text) // 2
    piece = text[start : start + 4]
    return piece if len(text) >= 12 and piece.strip() == piece and piece.isprintable() else None


def check_stop(said: Said, stop: str) -> Outcome:
    """Return whether a stop text ended an answer that would hold it."""
    kept = said.finish == "stop" and stop not in said.text
    return _outcome(
        "stop texts end the answer", kept, f"{said.finish!r}, and {stop!r} in {said.text[-40:]!r}"
    )


def check_same(check: str, one: str, other: str) -> Outcome:
    """Return whether two texts are equal."""
    at = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return _outcome(check, one == other, f"differ from character {at} on")


def check_long(one: Said, other: Said, again: Said, prompt_tokens: int) -> list[Outcome]:
    """Return whether a long prompt is taken in full. other: the answer where it begins otherwise; again: to
    the first once more. What does not repeat says nothing of the beginning."""
    found = [_equal("long prompts are taken", one.prompt_tokens, prompt_tokens)]
    same = (one.text, one.logprobs) == (other.text, other.logprobs)
    if (one.text, one.logprobs) == (again.text, again.logprobs) and (one.logprobs or one.text):
        found.append(_outcome("their beginning is read", not same, "another beginning changes nothing"))
    return found


def check_call(said: Said, is_needed: bool) -> list[Outcome]:
    """Return whether a tool was called as it should be, and with arguments that fit."""
    if not is_needed:
        return [_outcome("no tool is called", not said.calls, f"called {_names(said)}")]
    found = [_outcome("a tool is called", bool(said.calls), f"{said.text[:60]!r}")]
    if said.calls:
        problem = next(filter(None, (misfit(name, arguments) for name, arguments in said.calls)), "")
        found.append(_outcome("arguments fit the schema", not problem, problem))
    return found


def misfit(name: str, arguments: str) -> str:
    """Return what is wrong with a call of the tool; nothing where it fits its schema."""
    function = TOOL["function"]
    if name != function["name"]:
        return f"there is no tool {name!r:.60}"
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return f"not JSON: {arguments!r:.60}"
    if not isinstance(given, dict):
        return "the arguments are no object"
    if given.keys() != set(function["parameters"]["required"]):
        return f"other arguments: {', '.join(sorted(map(str, given)))!r:.80}"
    days = given["days_ahead"]
    if not isinstance(given["city"], str) or given["unit"] not in UNITS:
        return f"other values: {arguments!r:.80}"
    if not isinstance(days, int) or isinstance(days, bool) or not 0 <= days <= 7:
        return f"days_ahead is {days!r:.40}"
    return ""


def tool_bodies(count: int) -> list[tuple[bool, dict[str, Any]]]:
    """Return `count` questions that need the tool, and half as many that do not, as bodies of a chat."""

    def body(question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"messages": messages, "tools": [TOOL], "tool_choice": "auto"}

    asked = [
        f"What will the weather be in {CITIES[n % 8]} {n // 8 % 6 + 1} days from now, in {UNITS[n % 2]}?"
        for n in range(count)
    ]
    needed = [(True, body(text)) for text in asked]
    return needed + [(False, body(OTHERS[n % len(OTHERS)])) for n in range((count + 1) // 2)]


def rates(mine: Sequence[Outcome], honest: Sequence[Outcome] | None) -> list[dict[str, Any]]:
    """Return a row for each check that was made: how often it was kept, beside the honest server's."""
    rows: list[dict[str, Any]] = []
    for check in CHECKS:
        kept = [was_kept for name, was_kept, _ in mine if name == check]
        theirs = [was_kept for name, was_kept, _ in honest or () if name == check]
        if not kept:
            continue
        row: dict[str, Any] = (
            {"check": check} | _rate("", kept) | _rate("honest_", theirs) | {"p_value": None}
        )
        if theirs:
            table = [[sum(kept), len(kept) - sum(kept)], [sum(theirs), len(theirs) - sum(theirs)]]
            _, row["p_value"] = map(float, fisher_exact(table, alternative="less"))  # type: ignore[arg-type]
        rows.append(row)
    compared = [row for row in rows if row["p_value"] is not None]
    for row, p in zip(compared, holm([row["p_value"] for row in compared]), strict=True):
        row["p_value"] = p
    return rows


def decide_contract(rows: Sequence[Mapping[str, Any]], alpha: float) -> dict[str, Any]:
    """Return the decision about the rates of `rates`."""

    def named(some: Sequence[Mapping[str, Any]]) -> str:
        return "; ".join(f"{row['check']}: {row['kept']} of {row['n']}" for row in some)

    broken = [row for row in rows if row["check"] in EXACT and row["kept"] < row["n"]]
    worse = [row for row in rows if row["p_value"] is not None and row["p_value"] <= alpha]
    open_ = [row for row in rows if row["kept"] < row["n"] and row["p_value"] is None]
    if failed := [*broken, *(row for row in worse if row not in broken)]:
        return {"status": "FAIL", "why": named(failed), "alpha": alpha}
    if not rows:
        return {"status": "INCONCLUSIVE", "why": "nothing could be checked", "alpha": alpha}
    if open_:
        why = f"nothing says how often an honest server keeps this: {named(open_)}"
        return {"status": "INCONCLUSIVE", "why": why, "alpha": alpha}
    lower = [row for row in rows if row["kept"] < row["n"]]
    why = f"no worse than the honest server: {named(lower)}" if lower else "every check was kept every time"
    return {"status": "PASS", "why": why, "alpha": alpha}


def _rate(prefix: str, kept: Sequence[bool]) -> dict[str, Any]:
    names = [f"{prefix}kept", f"{prefix}n", f"{prefix}rate", f"{prefix or 'rate_'}ci"]
    if not kept:
        return dict.fromkeys(names)
    interval = list(clopper_pearson_interval(sum(kept), len(kept)))
    return dict(zip(names, (sum(kept), len(kept), sum(kept) / len(kept), interval), strict=True))


def _equal(check: str, given: int | None, expected: int) -> Outcome:
    return _outcome(check, given == expected, f"{given} instead of {expected}")


def _outcome(check: str, kept: bool, problem: str) -> Outcome:
    return check, kept, "" if kept else problem


def _names(said: Said) -> str:
    return ", ".join(name for name, _ in said.calls)[:80]

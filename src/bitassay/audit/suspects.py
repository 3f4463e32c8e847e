"""Which known change is nearest to what a server says? Answers are compared with what may have been served
instead: the reference quantized by a recipe or with a smaller cache, behind another prompt, or sampled in
another way (`hosts.py` makes them from words).

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
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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

Prompt = Callable[[PreTrainedTokenizerBase, Asking, Text, Sequence[int]], list[int]]


@dataclass(frozen=True)
class Suspect:
    """What a host may do instead. load: its model (None: the claimed one); prompt: of tokenizer, asking, text
    and prompt, the ids that it reads; rule: of sampling."""

    load: Callable[[], PreTrainedModel] | None = None
    prompt: Prompt | None = None
    rule: Rule | None = None


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

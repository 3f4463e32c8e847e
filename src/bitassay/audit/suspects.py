"""Which known change is nearest to what a server says? Answers are compared with models that may have been
served instead, such as the reference quantized by a recipe.

Each suspect reads the tokens of each answer once, in bfloat16, as most servers compute. Two numbers are
given: the distance (`distance.py`) of the server's evidence from what the suspect says, and how much of the
suspect's change is seen. With d the server's log-probabilities less the control's, u the suspect's less the
control's, both centred and weighted at each position as in the distance,

    seen = sum w d u / sum w u^2

over all positions and answers: near 1 for the model that answers, near 0 for the reference, and for other
changes as far as they do not go the same way. Rounding noise is in no suspect's direction, so `seen` tells
changes that are smaller than it. Its interval is a jackknife over answers. Greedy tokens have no `seen`.

The nearest suspect is a hint, not a verdict: a change that is not among them may be nearer still.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from bitassay.audit.asking import Asking
from bitassay.audit.distance import CAP, Rows, distances
from bitassay.audit.session import Session, positions_of
from bitassay.audit.wire import Position
from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import FEWEST, jackknife_of, student_interval
from bitassay.models.identity import identity

Suspect = Callable[[], PreTrainedModel]
NOBODY: Mapping[str, Suspect] = MappingProxyType({})
CLAIMED = "the model that was claimed"


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

    def read(model: PreTrainedModel) -> list[tuple[float, list[np.ndarray]]]:
        """Of each answer the mean distance, and the model's values where the server has one."""
        found = []
        for answer, positions in zip(answers, said, strict=True):
            ids, start = asking.read_as(answer["prompt_ids"], [each.token for each in positions])
            rows = session.reference.rows(model, ids, start)
            mean = float(distances(asking.level, positions, rows, asking.k).mean())
            found.append((mean, values_of(positions, rows)))
        return found

    own = read(session.reference.control)
    means, seen = {CLAIMED: [mean for mean, _ in own]}, {}
    for index, (name, load) in enumerate(suspects.items()):
        session.progress(f"comparing with {name}", index, len(suspects))
        model = load()
        if identity(model).tokenizer_digest != identity(session.reference.exact).tokenizer_digest:
            raise BitassayError(f"{name}: has another tokenizer than the reference", "one of the same tokens")
        theirs = read(model)
        means[name] = [mean for mean, _ in theirs]
        sums = [
            _sums(positions, mine, other)
            for positions, (_, mine), (_, other) in zip(said, own, theirs, strict=True)
        ]
        seen[name] = share_seen(np.array(sums))
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

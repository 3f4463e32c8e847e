"""How far what a server says of a text is from what the reference says, and how far honest rounding goes.

Top log-probabilities. At one position the server lists tokens v with log-probabilities s_v; the reference
has r_v for all. With d_v = s_v - r_v and weights w_v proportional to exp(r_v) over the tokens compared,

    distance = sum_v w_v |d_v - m|,    m = sum_v w_v d_v

in nats: centred, so that it compares log-odds, and neither a temperature's normaliser nor rounding of all
values alike counts; weighted by the reference's own probability, so that a tail that nobody sees does not
count. A token among the reference's k most likely ones that the server does not list has at most the smallest
listed value: d_v is taken as that bound where it is below r_v, else as 0, the least that it can be.

The chosen token's log-probability alone: |d|. Greedy tokens, named by the server or read from its text: the
margin, max r - r_chosen, by which the reference prefers another (2511.20621). Each |d|, and each margin,
counts as CAP at most. Sampled tokens have no distance at one position: see `surprise.py`.

The statistic of a text is the logarithm of its mean distance, less that of the *control*: what the reference
computed in bfloat16 says of the same tokens, against the reference in float32. Some texts are noisier than
others, for every honest host alike; the control takes that away. 0: as far off as bfloat16 is.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64

from bitassay.audit.wire import Position

CAP = 10.0
Level = Literal[  # the strongest first
    "prompt-logprobs", "logprobs", "prompt-chosen", "chosen", "tokens", "text", "sampled"
]
LEVELS: tuple[Level, ...] = get_args(Level)
GREEDY: tuple[Level, ...] = ("tokens", "text")  # levels that are judged by margins
FLOOR: dict[Level, float] = dict.fromkeys(GREEDY, 1e-4)  # keeps the logarithm of a mean margin finite
LEAST = 1e-6
Rows = Float64[np.ndarray, "positions vocabulary"]


def distances(
    level: Level, said: Sequence[Position], reference: Rows, k: int
) -> Float64[np.ndarray, " positions"]:
    """Return the distance at each position. reference: log-probabilities behind the same tokens."""
    assert len(said) == len(reference)
    if level in GREEDY:
        chosen = reference[np.arange(len(said)), [each.token for each in said]]
        return np.minimum(reference.max(1, initial=-np.inf) - chosen, CAP)
    if level in ("chosen", "prompt-chosen"):
        differences = [
            (each.logprob or 0.0) - row[each.token] for each, row in zip(said, reference, strict=True)
        ]
        return np.minimum(np.abs(np.array(differences, dtype=np.float64)), CAP)
    return np.array([top_distance(each, row, k) for each, row in zip(said, reference, strict=True)])


def top_distance(said: Position, reference: Float64[np.ndarray, " vocabulary"], k: int) -> float:
    """Return the distance of one position's top log-probabilities."""
    values = dict(said.top)
    smallest = min(sorted(values.values(), reverse=True)[:k], default=0.0)
    if said.logprob is not None:
        values[said.token] = said.logprob
    own = np.argpartition(reference, -k)[-k:] if k < len(reference) else np.arange(len(reference))
    missing = np.array([token for token in own.tolist() if token not in values], dtype=np.int64)
    listed = np.array([*values], dtype=np.int64)
    d = np.concatenate(
        [
            np.array([*values.values()], dtype=np.float64) - reference[listed],
            np.minimum(smallest - reference[missing], 0.0),
        ]
    )
    weights = np.exp(np.concatenate([reference[listed], reference[missing]]))
    if not weights.sum():
        return CAP
    weights = weights / weights.sum()
    d = d.clip(-CAP, CAP)
    return float(weights @ np.abs(d - weights @ d))


def as_said(level: Level, tokens: Sequence[int], rows: Rows, k: int) -> list[Position]:
    """Return what a server with these log-probabilities would say of `tokens`; of greedy tokens, which it
    would take instead."""
    if level in GREEDY:
        return [Position(int(row.argmax())) for row in rows]
    positions = []
    for token, row in zip(tokens, rows, strict=True):
        best: list[int] = []
        if level in ("logprobs", "prompt-logprobs"):
            best = np.argpartition(row, -k)[-k:].tolist() if k < len(row) else list(range(len(row)))
        positions.append(Position(token, float(row[token]), tuple((each, float(row[each])) for each in best)))
    return positions


def statistic(level: Level, distance: float, control: float) -> float:
    """Return the statistic of a text, from the mean distance of the server and that of the control."""
    floor = FLOOR.get(level, LEAST)
    return math.log(distance + floor) - math.log(control + floor)

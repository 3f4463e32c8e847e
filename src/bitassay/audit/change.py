"""Has an endpoint changed? Ask it the requests of an earlier audit again; no reference model is needed.

Each request was answered once then, and is answered m times now, in an order that is drawn. If nothing has
changed, the m + 1 answers to a request are exchangeable: the earlier one is equally likely to be any of them.
Its mean distance from the others is ranked among theirs, ties by their mean rank, and the ranks of all
requests are added. Given the answers, each request's rank is one of its m + 1 ranks with equal probability,
so the sum's distribution is known exactly (by convolution), and

    p = P(sum >= what it is)

is valid whatever the noise of the server, as long as it does not depend on the time: a permutation test, as
LT's (2512.03816), within requests. A server that repeats its answers has the rank of a tie, p = 1, until it
changes; then n requests have p = (m + 1)^-n. Differences below SAME count as repeated: llama.cpp's server was
seen to differ by 1e-8 nats with what else it answered at the time.

The distance of two answers, in nats: at each position up to the first token in which they differ, the
difference of the log-probabilities that both list, centred and weighted by their mean probability (of one
value alone, its difference), and one nat for each position that comes after.

What it cannot say: which of the two is the model that was sold, and whether the model has changed or only its
numerics (another batch size, cache, GPU or load). A host that keeps its answers can repeat them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from bitassay.audit.asking import Asking, Text
from bitassay.audit.client import Target
from bitassay.audit.distance import CAP
from bitassay.audit.replay import Files, read_recorded
from bitassay.audit.session import ask_all, positions_of
from bitassay.audit.wire import Position, Vocabulary
from bitassay.errors import BitassayError
from bitassay.record.environment import environment
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import open_run_folder, run_plan

REPEATS = 3
SAME = 1e-6  # nats: distances that differ by less are equal, since servers say float32 numbers


def change(
    recorded: Path,
    target: Target,
    vocabulary: Vocabulary,
    tokenizer_digest: str,
    *,
    repeats: int = REPEATS,
    alpha: float = 0.01,
    seed: int = 0,
    concurrency: int = 4,
    out: Path | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Return the run of a comparison with a recorded audit, and its folder; the same call goes on.
    vocabulary, tokenizer_digest: of the recording's reference. Raises BitassayError for a folder that is no
    audit, another tokenizer, and a server that cannot be asked."""
    was = read_recorded(recorded)
    if tokenizer_digest != was.reference.tokenizer_digest:
        raise BitassayError(
            f"{recorded}: was recorded with another tokenizer, that of {was.reference.name}",
            f"--reference {was.reference.name}",
        )
    files = Files(recorded, was, vocabulary)
    asking, parts = files.asking(), files.parts(0)
    before = [parts[f"answer-0-{number:05d}"] for number in range(was.requests)]
    work = {
        "url": target.endpoint.url,
        "model": target.model,
        "against": digest_json(parts),
        "repeats": repeats,
        "alpha": alpha,
        "seed": seed,
    }
    folder = open_run_folder("change", run_plan("change", work), out)
    asked = [Text(each["text"], tuple(each["ids"])) for each in parts["texts-audited"]][: was.requests]
    named = {f"answer-{m}-{n:05d}": text for n, text in enumerate(asked) for m in range(repeats)}
    order = np.random.default_rng(seed).permutation(list(named))
    drawn = {str(name): named[str(name)] for name in order}
    ask_all(folder, target, asking, drawn, vocabulary, concurrency, progress)
    rows, groups = [], []
    for number, then in enumerate(before):
        now = [folder.part(f"answer-{m}-{number:05d}", dict) for m in range(repeats)]
        row, means = _compared(number, asking, [then, *now])
        rows.append(row)
        if means is not None:
            groups.append(means)
    run = write_run(
        folder,
        model={"name": was.reference.name, "origin": target.endpoint.url, "asked_for": target.model},
        settings={**work, "recorded_url": was.url, "asked_by": asdict(asking)},
        environment=environment(),
        rows=rows,
        decision=_decision(groups, len(rows), repeats, alpha),
    )
    return run, folder.path


def _compared(
    number: int, asking: Asking, answers: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Float64[np.ndarray, " answers"] | None]:
    """A row, and each answer's mean distance from the others; None where one has no evidence."""
    said = [positions_of(dict(answer), asking) for answer in answers]
    row: dict[str, Any] = {"request": number + 1, "positions": min(map(len, said))}
    row |= dict.fromkeys(("then_now", "now_now", "rank")) | {"problem": ""}
    if not all(said):
        errors = [str(answer.get("error", "no-evidence")) for answer in answers if "error" in answer]
        return row | {"problem": (errors or ["no-evidence"])[0]}, None
    table = np.array([[answer_distance(one, other) for other in said] for one in said])
    means = table.sum(1) / (len(said) - 1)
    now = table[1:, 1:]
    row["then_now"] = float(table[0, 1:].mean())
    row["now_now"] = float(now.sum() / (now.size - len(now))) if len(now) > 1 else None
    row["rank"] = float(ranks(means)[0])
    return row, means


def answer_distance(one: Sequence[Position], other: Sequence[Position]) -> float:
    """Return the distance of two answers to one request, in nats a position."""
    longest, total = max(len(one), len(other)), 0.0
    for at in range(longest):
        if at >= min(len(one), len(other)):
            return (total + longest - at) / longest
        total += _position_distance(one[at], other[at])
        if one[at].token != other[at].token:
            return (total + longest - at) / longest
    return total / longest


def _position_distance(one: Position, other: Position) -> float:
    mine, theirs = (
        dict(each.top) | ({} if each.logprob is None else {each.token: each.logprob}) for each in (one, other)
    )
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return 0.0 if not (mine or theirs) else CAP
    a, b = (np.array([values[token] for token in both], dtype=np.float64) for values in (mine, theirs))
    d, weights = (a - b).clip(-CAP, CAP), np.exp((a + b) / 2)
    if len(both) == 1 or not weights.sum():
        return float(np.abs(d).mean())
    weights = weights / weights.sum()
    return float(weights @ np.abs(d - weights @ d))


def ranks(means: Float64[np.ndarray, " answers"]) -> Float64[np.ndarray, " answers"]:
    """Return the ranks of mean distances; those that are the SAME by their mean rank."""
    return rankdata(np.round(means / SAME))


def change_p_value(groups: Sequence[Float64[np.ndarray, " answers"]]) -> float:
    """Return P(sum of the ranks of one answer of each group, drawn evenly >= that of the first ones)."""
    distribution, observed = np.ones(1), 0
    for means in groups:
        doubled = np.rint(2 * ranks(means)).astype(int)
        observed += doubled[0]
        step = np.bincount(doubled) / len(doubled)
        distribution = np.convolve(distribution, step)
    return float(min(distribution[observed:].sum(), 1.0))


def _decision(groups: Sequence[np.ndarray], requests: int, repeats: int, alpha: float) -> dict[str, Any]:
    p = change_p_value(groups) if groups else 1.0
    made = {"alpha": alpha, "p_value": p, "requests": len(groups)}
    if (repeats + 1.0) ** -len(groups) > alpha:
        why = f"{len(groups)} of {requests} requests can be compared: too few to see any change"
        return made | {"status": "INCONCLUSIVE", "why": why}
    if p <= alpha:
        why = f"p {p:.2g} (level {alpha:g}): the answers are not those of then"
        return made | {"status": "FAIL", "why": why}
    return made | {"status": "PASS", "why": f"p {p:.2g} (level {alpha:g}): no change is seen"}

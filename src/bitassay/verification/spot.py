"""Spot checks of whole traces: a few segments of layers, which the verifier draws once it has the trace, and
the tokens by the host's own last states.

Between one sampled layer and the next a run can be checked alone (`detectors/segment_distance.py`), and so
can the output head. All segments and the head together are the whole run. A spot check computes those that
it has drawn, in the verifier's dtype and in the next higher precision, and nothing else: of four segments one
costs a quarter of two prefills and two output heads.

**Level.** Its score is the largest z of some of the statistics whose largest makes the score of a full check,
by the same fits, and it is ranked among the same honest scores. So it is at most the score of a full check
of the same trace, and whatever it refuses a full check has a score to refuse: alpha holds, for every draw.
What is left out is `unlike-calibration`, which needs prefills: where a full check says INCONCLUSIVE of a text
that rounds like none of calibration, a spot check may say FAIL.

**Power.** A host that computes otherwise everywhere shows in any segment. One that changes a single layer is
found as often as its segment is drawn. What no segment shows is not looked at: the verifier's own choice of
tokens, what many small errors add up to, another rotary base.

In a ledger scores of one kind are ranked among each other, so spot checks are not entered.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedModel

from bitassay.engines.segments import needless
from bitassay.errors import BitassayError, at_least
from bitassay.models.identity import identity
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors.detector import Comparison, Pair
from bitassay.verification.detectors.registry import DETECTORS, HEAD, SEGMENTS
from bitassay.verification.observe import Observation, batches, check_verifier, replayed_pairs
from bitassay.verification.profile import Profile, Score, read_profile
from bitassay.verification.scores import standardise, statistics
from bitassay.verification.structure import Reason, Request
from bitassay.verification.submissions import CheckResult, OpenedStates, check_submission
from bitassay.verification.trace import Trace
from bitassay.verification.verdict import Verdict
from bitassay.verification.verify import concluded, profile_for, verify_many, why_undecided

Draw = Callable[[Sequence[int], int], Sequence[int]]


def drawn(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the ends of `count` segments at random, ascending; of all where there are not more."""
    return tuple(sorted(secrets.SystemRandom().sample(list(layers), min(count, len(layers)))))


def verify_segments(
    traces: Sequence[Trace],
    model: PreTrainedModel,
    count: int,
    *,
    profile: Profile | str | Path | None = None,
    alpha: float | None = None,
    requests: Sequence[Request] | None = None,
    now: datetime | None = None,
    draw: Draw = drawn,
    progress: Progress = silent,
) -> list[Verdict]:
    """Return verdicts on many traces, of each of which `count` segments are looked at; the other arguments
    are those of `verify_many`. draw: chooses among the ends of segments. A trace with numbers that are not
    finite is checked in full. Raises BitassayError for a model whose segments do not run alone.
    """
    at_least(1, segments=count)
    check_verifier(model)
    requests = [Request()] * len(traces) if requests is None else requests
    profile = read_profile(Path(profile)) if isinstance(profile, (str, Path)) else profile
    name, verdicts = identity(model).name, dict[int, Verdict]()
    groups: dict[tuple[int, ...], list[tuple[int, CheckResult, OpenedStates]]] = {}
    for index, (trace, request) in enumerate(zip(traces, requests, strict=True)):
        result = check_submission(trace, model, request)
        if result.opened is None or not result.answers:
            verdicts[index] = Verdict("FAIL", result.defects, name, result.tokens)
        elif not result.opened.is_whole:
            options = {"profile": profile, "alpha": alpha, "requests": [request], "now": now}
            (verdicts[index],) = verify_many([trace], model, **options)
        else:
            ends = tuple(draw(result.opened.header.layers, count))
            groups.setdefault(ends, []).append((index, result, result.opened))
    for ends, members in groups.items():
        headers = [opened.header for _, _, opened in members]
        check_alone(model, headers[0].layers, ends)
        for batch in batches(headers, model):
            progress("verifying", len(verdicts), len(traces))
            states = [members[place][2].states for place in batch]
            replays = replayed_pairs([headers[place] for place in batch], model, states, ends)
            pairs = zip(*replays, strict=True)
            for place, pair in zip(batch, pairs, strict=True):
                index, result, opened = members[place]
                observation = observed(opened, pair, ends, model)
                verdicts[index] = decide(result, opened, observation, model, profile, alpha, now)
    progress("verifying", len(traces), len(traces))
    return [verdicts[index] for index in range(len(traces))]


def check_alone(model: PreTrainedModel, layers: Sequence[int], ends: Sequence[int]) -> None:
    """Raise BitassayError for a model that cannot compute these segments without the others."""
    if len(ends) < len(layers) and not needless(model, layers, ends):
        raise BitassayError(
            f"{type(model).__name__} hands on more than states from layer to layer, or is not in memory, so "
            "that no segment of its layers runs alone",
            "verify without --segments",
        )


def observed(opened: OpenedStates, pair: Pair, ends: Sequence[int], model: PreTrainedModel) -> Observation:
    """Return the series of the segments that end at `ends`, and of the tokens by the host's last states.
    pair: the replay."""
    header, own, precise = opened.header.model_copy(update={"layers": tuple(ends)}), *pair
    comparison = Comparison(
        header, opened.positions, opened.states, own, model.dtype, replay=(own, precise, precise)
    )
    series = {name: tuple(DETECTORS[name].check(comparison, None)) for name in (SEGMENTS, HEAD)}
    return Observation.of(comparison, series)


def spot_score(observation: Observation, profile: Profile) -> Score:
    """Return the largest z of what a spot check has looked at, by the fits of a full check."""
    places = [profile.layers.index(layer) for layer in observation.layers]
    fits = {SEGMENTS: [profile.fits[SEGMENTS][place] for place in places], HEAD: profile.fits[HEAD]}
    computed = statistics(observation, [SEGMENTS, HEAD])
    assert computed is not None
    return Score.of(standardise(computed, fits, observation.tokens - 1), observation.layers)


def decide(
    checked: CheckResult,
    opened: OpenedStates,
    observation: Observation,
    model: PreTrainedModel,
    profile: Profile | None = None,
    alpha: float | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Return the verdict on one spot check."""
    header = opened.header
    profile = profile or profile_for(header, model)
    counted = replace(observation, series={})  # fewer series than the profile has are right here
    verdict = concluded(
        Verdict(
            "INCONCLUSIVE",
            (),
            identity(model).name,
            checked.tokens,
            observation,
            n_prompt=len(header.prompt_ids),
            segments=tuple(observation.layers),
        ),
        header,
        checked.defects,
        [*checked.undecided, *why_undecided(profile, header, model, counted, alpha, now)],
        profile,
        alpha,
        lambda calibrated: spot_score(observation, calibrated),
    )
    if verdict.status != "PASS":
        return verdict
    ends = ", ".join(map(str, observation.layers))
    sentence = f"segments of layers that end at {ends}, and tokens by the host's last states, are those of"
    sentence += " an honest run; nothing else was looked at"
    return replace(verdict, reasons=(Reason("as-honest", sentence),))

"""The detectors, side by side: what each makes of the first n tokens of a trace.

A detector turns what `observation.py` says of the first n tokens into one or more *statistics*, larger for
less honest runs. Statistics become a score as in `profile.py`: each is standardised by its mean and standard
deviation over honest runs (`HonestFit`), and the score is the largest. So every detector gets the same
calibration, and what is compared is the evidence.

    detector             evidence a token                       source
    verillm-paper        full states at the sampled layers      arXiv 2509.24257; cells not accepted
    verillm-documents    the same                               the experiment documents' thresholds
    distance             the same                               mean log relative distance by layer
    toploc               258 bytes for 32 tokens                arXiv 2501.16007, on the last sampled layer
    activation-difr      a few projected numbers                arXiv 2511.20621
    token-difr           nothing: ids, nonce and seed           arXiv 2511.20621
    structure            the header; receipt and opening        `exchange.py`: exact, so 0 or infinite
    combined             distance, token-difr and structure     the verdict of this package
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill
from bitassay.verification.calibrate import STATES_SD, TOKENS_SD
from bitassay.verification.detectors import difr, toploc
from bitassay.verification.detectors.verillm import RULE_SETS
from bitassay.verification.evidence import own_prefills, token_margins
from bitassay.verification.exchange import Shown
from bitassay.verification.observation import (
    PROJECTION_SEED,
    Observation,
    Pair,
    chunk_score,
    log_distances,
    pairs,
    projected,
    refused_cells,
)
from bitassay.verification.profile import OFFSET
from bitassay.verification.receipts.merkle import merkle_root
from bitassay.verification.receipts.receipt import trace_leaves
from bitassay.verification.structure import Request, claim_defects, shape_defects
from bitassay.verification.trace import Trace

STRUCTURE_CAUGHT = math.inf


@dataclass(frozen=True)
class Statistics:
    """What a detector makes of n tokens: numbers, and for each the smallest spread that a fit may have.
    `fitted_as` names for each number the one whose fit it is standardised by: prompt positions are judged by
    the generated ones, as in `profile.py`."""

    values: tuple[float, ...]
    smallest_sd: tuple[float, ...]
    fitted_as: tuple[int, ...]


@dataclass(frozen=True)
class Desk:
    """What a verifier has in hand once its prefill of one trace is done."""

    trace: Trace
    own: Prefill
    layers: Sequence[Pair]
    model: PreTrainedModel
    request: Request

    @property
    def last(self) -> Float[Tensor, "generated hidden"]:
        """The verifier's states at the last sampled layer."""
        return self.layers[-1].generated[1]


@dataclass(frozen=True)
class Detector:
    """statistics: of an observation's first n tokens, None where there is nothing to see. evidence_bytes:
    what a token's evidence takes, for `layers` sampled layers of `hidden` 16-bit numbers. check: the
    verifier's work beyond the prefill, on what `prove`, the host's work beyond generation, has made."""

    name: str
    statistics: Callable[[Observation, int], Statistics | None]
    evidence_bytes: Callable[[int, int], float]
    check: Callable[[Desk, Any], object]
    prove: Callable[[Trace], object] | None = None
    accepts: Callable[[Observation, int], bool | None] = lambda observation, n: None


def _verillm(rules: str) -> Callable[[Observation, int], Statistics | None]:
    def statistics(observation: Observation, n: int) -> Statistics | None:
        cells = observation.refused_cells.get(rules, ())[:n]
        return _single(float(np.mean(cells)), 0.01) if cells else None

    return statistics


def _distance(observation: Observation, n: int) -> Statistics | None:
    generated = tuple(float(np.mean(layer[:n])) for layer in observation.log_distances if layer[:n])
    if not generated:
        return None
    count = len(generated)
    return Statistics(
        generated + observation.prompt_log_distances,
        (STATES_SD,) * (2 * count),
        tuple(range(count)) * 2,
    )


def _toploc_at(observation: Observation, n: int) -> tuple[float, bool] | None:
    """By n tokens, or by all where there are fewer."""
    return observation.toploc.get(max((m for m in observation.toploc if m <= n), default=0))


def _toploc_statistics(observation: Observation, n: int) -> Statistics | None:
    found = _toploc_at(observation, n)
    return _single(found[0], 0.1) if found else None


def _toploc_accepts(observation: Observation, n: int) -> bool | None:
    found = _toploc_at(observation, n)
    return found[1] if found else None


def _activation_difr(observation: Observation, n: int) -> Statistics | None:
    cells = observation.projected[:n]
    return _single(float(np.mean(cells)), STATES_SD) if cells else None


def _token_difr(observation: Observation, n: int) -> Statistics | None:
    margins = observation.margins[:n]
    return _single(math.log(float(np.mean(margins)) + OFFSET), TOKENS_SD) if margins else None


def _structure(observation: Observation, n: int) -> Statistics:
    return _single(STRUCTURE_CAUGHT if observation.defects else 0.0, 1.0)


def _combined(observation: Observation, n: int) -> Statistics | None:
    structure = _structure(observation, n)
    if observation.defects:
        return structure
    states, tokens = _distance(observation, n), _token_difr(observation, n)
    if states is None or tokens is None:
        return None
    parts = (structure, states, tokens)
    offsets = np.cumsum([0, *(len(part.values) for part in parts)])
    return Statistics(
        tuple(value for part in parts for value in part.values),
        tuple(sd for part in parts for sd in part.smallest_sd),
        tuple(
            int(offset) + index
            for offset, part in zip(offsets, parts, strict=False)
            for index in part.fitted_as
        ),
    )


def _single(value: float, smallest_sd: float) -> Statistics:
    return Statistics((value,), (smallest_sd,), (0,))


def _full_states(layers: int, hidden: int) -> float:
    return 2.0 * layers * hidden


def _nothing(layers: int, hidden: int) -> float:
    return 0.0


# --- the work of host and verifier, apart ---


def _last(trace: Trace) -> Float[Tensor, "generated hidden"]:
    return trace.states[trace.header.layers[-1]][trace.n_prompt :]


def _commit(trace: Trace) -> bytes:
    return merkle_root(trace_leaves(trace))


def _check_structure(desk: Desk, _: Any) -> object:
    return shape_defects(desk.trace, desk.model) + claim_defects(desk.trace, desk.model, desk.request)


def _check_states(desk: Desk, _: Any) -> object:
    return log_distances(desk.layers, desk.model.dtype)


def _check_cells(rules: str) -> Callable[[Desk, Any], object]:
    return lambda desk, _: refused_cells(desk.layers, rules, desk.model.dtype)


def _check_tokens(desk: Desk, _: Any) -> object:
    return token_margins(desk.trace.header, desk.own)


def _check_all(desk: Desk, _: Any) -> object:
    return _check_structure(desk, _), _check_states(desk, _), _check_tokens(desk, _)


DETECTORS = {
    detector.name: detector
    for detector in (
        *(
            Detector(f"verillm-{rules}", _verillm(rules), _full_states, _check_cells(rules), _commit)
            for rules in RULE_SETS
        ),
        Detector("distance", _distance, _full_states, _check_states, _commit),
        Detector(
            "toploc",
            _toploc_statistics,
            lambda *_: (2 + 2 * toploc.TOP) / toploc.CHUNK,
            lambda desk, proofs: chunk_score(proofs, desk.last),
            lambda trace: toploc.prove_chunks(_last(trace)),
            _toploc_accepts,
        ),
        Detector(
            "activation-difr",
            _activation_difr,
            lambda *_: 2.0 * difr.DIMENSIONS,
            lambda desk, claimed: projected(claimed, desk.last, desk.model.dtype),
            lambda trace: difr.project(_last(trace), PROJECTION_SEED),
        ),
        Detector("token-difr", _token_difr, _nothing, _check_tokens),
        Detector("structure", _structure, _nothing, _check_structure),
        Detector("combined", _combined, _full_states, _check_all, _commit),
    )
}


@dataclass(frozen=True)
class Seconds:
    """For each token of the output: the verifier's prefill, which all detectors share; beyond it the check of
    each, and what each makes the host do beyond generation."""

    prefill: float
    check: dict[str, float]
    prove: dict[str, float]


def measure(
    traces: Sequence[Trace], model: PreTrainedModel, requests: Sequence[Request], rounds: int = 3
) -> Seconds:
    """Medians over `rounds` and traces, one trace at a time; the detectors take turns, so that what else the
    machine does falls on all of them alike. A first round is not counted."""
    found: dict[tuple[str, str], list[float]] = {}

    def timed(part: str, name: str, tokens: int, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        found.setdefault((part, name), []).append((time.perf_counter() - start) / tokens)
        return value

    for round_ in range(rounds + 1):
        if round_ == 1:
            found.clear()
        for trace, request in zip(traces, requests, strict=True):
            tokens = trace.n_tokens
            [(_, own)] = timed("prefill", "", tokens, lambda trace=trace: list(own_prefills([trace], model)))
            shown = Shown(trace.header, trace.header.positions, trace.states)
            desk = Desk(trace, own, pairs(shown, own), model, request)
            for name, detector in DETECTORS.items():
                proof = None
                if detector.prove is not None:
                    proof = timed("prove", name, tokens, functools.partial(detector.prove, trace))
                timed("check", name, tokens, functools.partial(detector.check, desk, proof))

    def middle(part: str, name: str = "") -> float:
        return median(found.get((part, name), [0.0]))

    return Seconds(
        middle("prefill"),
        {name: middle("check", name) for name in DETECTORS},
        {name: middle("prove", name) for name in DETECTORS},
    )


@dataclass(frozen=True)
class HonestFit:
    """Mean and standard deviation of each statistic over honest runs, and how to apply them."""

    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, honest: Sequence[Statistics]) -> "HonestFit":
        values = np.array([one.values for one in honest])
        columns = np.array(honest[0].fitted_as)
        sd = np.maximum(values.std(0, ddof=1), honest[0].smallest_sd)
        return cls(values.mean(0)[columns], sd[columns])

    def score(self, statistics: Statistics | None) -> float:
        """The largest standardised statistic: infinite for a structural defect, minus infinite where the
        detector sees nothing, so that blindness is never a detection."""
        if statistics is None:
            return -math.inf
        if STRUCTURE_CAUGHT in statistics.values:
            return math.inf
        return float(np.max((np.array(statistics.values) - self.mean) / self.sd))

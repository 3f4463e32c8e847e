"""Claims, of a document or of a theory, and what a study says of them.

A claim is that every one of some quantities lies in an open range: "INT8 is more accurate" is accuracy(INT8)
- accuracy(FP8) in (0, inf). A quantity is measured with an interval, at 95 % for all quantities of a claim
together (Bonferroni), and

    supported        every interval lies within the range
    not supported    some interval lies wholly outside
    not decidable    neither: an interval reaches over the edge, and says how much more data it would take

so that no claim is called right or wrong by a number that chance could have turned round. `expected` is what
the document gives, on its own models and machine, or the theory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitassay.evaluation.quality import text_difference
from bitassay.studies.variants import Findings

LEVEL = 0.95
MORE = (0.0, math.inf)
LESS = (-math.inf, 0.0)
Verdict = Literal["supported", "not supported", "not decidable at this n"]


@dataclass(frozen=True)
class Quantity:
    """A number with its interval; None where there is none, as from a single window."""

    name: str
    value: float
    interval: tuple[float, float] | None


Measure = Callable[[Any, float], Quantity | None]  # of the study's own Findings


@dataclass(frozen=True)
class Claim:
    """measures: the quantities, given the level of their intervals; None of what was not measured here."""

    study: str
    section: str
    text: str
    expected: str
    within: tuple[float, float]
    measures: tuple[Measure, ...]
    unit: str = "points"


def verdict(quantities: list[Quantity], within: tuple[float, float]) -> Verdict:
    """By the rule above."""
    low, high = within
    ends = [one.interval for one in quantities]
    if any(end is not None and (end[1] <= low or end[0] >= high) for end in ends):
        return "not supported"
    if ends and all(end is not None and low < end[0] and end[1] < high for end in ends):
        return "supported"
    return "not decidable at this n"


def judged(found: Findings, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Those of the claims that are of this study, with what was measured and the verdict."""
    rows = []
    for claim in claims:
        if claim.study != found.plan.study:
            continue
        level = 1 - (1 - LEVEL) / len(claim.measures)
        measured = [one for measure in claim.measures if (one := measure(found, level)) is not None]
        missing = len(claim.measures) - len(measured)
        decided = verdict(measured, claim.within)
        if missing and decided == "supported":
            decided = "not decidable at this n"
        rows.append(
            {
                "section": claim.section,
                "claim": claim.text,
                "expected": claim.expected,
                "unit": claim.unit,
                "within": [None if math.isinf(end) else end for end in claim.within],
                "measured": [
                    {"name": one.name, "value": one.value, "interval": one.interval} for one in measured
                ],
                "not_measured": missing,
                "verdict": decided,
            }
        )
    return rows


def perplexity(second: str, first: str, fraction: bool = False) -> Measure:
    """Perplexity of `second` less that of `first`, as a fraction of the first where so asked."""

    def measure(found: Findings, level: float) -> Quantity | None:
        a, b = found.called(first), found.called(second)
        if not {a, b} <= found.text.keys():
            return None
        one = text_difference(found.text[a], found.text[b], level)
        value = (one.ppl_fraction, one.ppl_fraction_ci) if fraction else (one.ppl, one.ppl_ci)
        return Quantity(f"{b} - {a}", *value)

    return measure


def divergence(second: str, first: str, fraction: bool = False) -> Measure:
    """KL to the base of `second` less that of `first`, as a fraction of the first where so asked."""

    def measure(found: Findings, level: float) -> Quantity | None:
        a, b = found.called(first), found.called(second)
        if not {a, b} <= found.text.keys():
            return None
        one = text_difference(found.text[a], found.text[b], level)
        if not fraction:
            return Quantity(f"{b} - {a}", one.kl, one.kl_ci)
        if one.kl_fraction is None:
            return None
        return Quantity(f"{b} / {a} - 1", one.kl_fraction, one.kl_fraction_ci)

    return measure

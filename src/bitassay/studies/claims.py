"""Claims of a source or a theory, and what a study says of them. They are data, in `claims.yaml`.

A claim is that every one of some quantities lies in an open range: "INT8 is more accurate" is accuracy(INT8)
- accuracy(FP8) in (0, inf), or `more`. A quantity is measured with an interval, at 95 % for all quantities of
a claim together (Bonferroni), and

    supported        every interval lies within the range
    not supported    some interval lies wholly outside
    not decidable    neither: an interval reaches over the edge, and says how much more data it would take

so that no claim is called right or wrong by a number that chance could have turned round. `expected` is what
the source gives, on its own models and machine, or the theory. A measure is its kind and names of variants:

    ppl, kl, ppl_fraction, kl_fraction B A   of B less that of A, the last two as a share of A's
    direct, generate B A                     accuracy of B less that of A, asked directly or by text
    generate-direct A                        accuracy of A asked by text less that asked directly
    mean-generate G ...                      accuracy of INT8 less FP8's in the mean over granularities
    overhead A                               what scales add to the 8 bits of a weight, as a share
    rounding SHAPE                           FP8's rounding error over INT8's, one scale for the tensor
    documented SHAPE FORMAT                  the rounding error over what the report gives for a product
    decode A                                 decoding speed over the base's, one sequence, within rounds
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from bitassay.evaluation.quality import text_difference
from bitassay.evaluation.statistics import logit_interval, mean_of, paired_difference
from bitassay.record.files import read_yaml
from bitassay.record.schema import Fields
from bitassay.studies.variants import Findings

LEVEL = 0.95
RANGES = {"more": (0.0, math.inf), "less": (-math.inf, 0.0)}
Interval = tuple[float, float]
Verdict = Literal["supported", "not supported", "not decidable at this n"]


class Quantity(NamedTuple):
    """A number with its interval; None where there is none, as from a single window."""

    name: str
    value: float
    interval: Interval | None


class Claim(Fields):
    """within: the range, open at both ends."""

    claim: str
    section: str = "-"
    expected: str = "-"
    within: Literal["more", "less"] | Interval
    unit: str = "points"
    measures: tuple[str, ...]

    @property
    def range(self) -> Interval:
        return RANGES[self.within] if isinstance(self.within, str) else self.within


def read_claims(path: Path) -> dict[str, tuple[Claim, ...]]:
    """Read the claims by study."""
    return TypeAdapter(dict[str, tuple[Claim, ...]]).validate_python(read_yaml(path))


def verdict(quantities: Sequence[Quantity], within: Interval) -> Verdict:
    """Return the verdict by the rule above."""
    low, high = within
    ends = [quantity.interval for quantity in quantities]
    if any(end is not None and (end[1] <= low or end[0] >= high) for end in ends):
        return "not supported"
    if ends and all(end is not None and low < end[0] and end[1] < high for end in ends):
        return "supported"
    return "not decidable at this n"


def judged(findings: Findings, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Return the claims with what was measured and the verdict."""
    rows = []
    for claim in claims:
        level = 1 - (1 - LEVEL) / len(claim.measures)
        quantities = [measured(text, findings, level) for text in claim.measures]
        known = [quantity for quantity in quantities if quantity is not None]
        missing, decided = len(quantities) - len(known), verdict(known, claim.range)
        rows.append(
            {
                **claim.model_dump(include={"section", "claim", "expected", "unit"}),
                "within": [None if math.isinf(end) else end for end in claim.range],
                "measured": [quantity._asdict() for quantity in known],
                "not_measured": missing,
                "verdict": "not decidable at this n" if missing and decided == "supported" else decided,
            }
        )
    return rows


def measured(text: str, findings: Findings, level: float) -> Quantity | None:
    """Return the quantity of a measure with its interval at `level`; None where it was not measured here."""
    kind, *names = text.split()
    return MEASURES[kind](findings, level, *(findings.called(name) for name in names))


def _text(field: str) -> Callable[..., Quantity | None]:
    def measure(findings: Findings, level: float, second: str, first: str) -> Quantity | None:
        if not {first, second} <= findings.text.keys():
            return None
        difference = text_difference(findings.text[first], findings.text[second], level)
        if (value := getattr(difference, field)) is None:
            return None
        name = f"{second} / {first} - 1" if field == "kl_fraction" else f"{second} - {first}"
        return Quantity(name, value, getattr(difference, f"{field}_ci"))

    return measure


def _accuracy(method: str, first_method: str) -> Callable[..., Quantity | None]:
    def measure(findings: Findings, level: float, second: str, first: str | None = None) -> Quantity | None:
        first = first or second
        if not findings.has(first, second):
            return None
        sides = findings.right[first][first_method], findings.right[second][method]
        difference = paired_difference(*sides, level=level)
        return Quantity(f"{second} - {first}", difference.difference, difference.interval)

    return measure


def _mean_generate(findings: Findings, level: float, *granularities: str) -> Quantity | None:
    pairs = [(f"fp8-{name}-fake", f"int8-{name}-fake") for name in granularities]
    if not all(findings.has(*pair) for pair in pairs):
        return None
    right = findings.right
    gained = [np.subtract(right[b]["generate"], right[a]["generate"], dtype=float) for a, b in pairs]
    mean = mean_of(np.mean(gained, axis=0))
    return Quantity(f"mean of {len(pairs)} granularities", mean.value, logit_interval(mean, -1, 1, level))


def _overhead(findings: Findings, level: float, variant: str) -> Quantity | None:
    """It is counted, so its interval is the number itself."""
    bits = findings.facts.get(variant, {}).get("bits_per_weight")
    return None if bits is None else Quantity(variant, bits / 8 - 1, (bits / 8 - 1, bits / 8 - 1))


def _rounding(findings: Findings, level: float, shape: str) -> Quantity | None:
    rows = _products(findings, shape)
    if not {"int8", "fp8"} <= rows.keys():
        return None
    (int_low, int_high), (low, high) = (rows[name]["rounding_error_range"] for name in ("int8", "fp8"))
    value = rows["fp8"]["rounding_error"] / rows["int8"]["rounding_error"]
    return Quantity(f"fp8 / int8 at {shape}", value, _spanned(low / int_high, high / int_low))


def _documented(findings: Findings, level: float, shape: str, format: str) -> Quantity | None:
    row = _products(findings, shape).get(format, {})
    if not (documented := row.get("documented")):
        return None
    low, high = row["rounding_error_range"]
    spanned = _spanned(low / documented, high / documented)
    return Quantity(f"{format} at {shape}", row["over_documented"], spanned)


def _products(findings: Findings, shape: str) -> dict[str, Any]:
    rows = [] if findings.products is None else findings.products["rows"]
    return {row["format"]: row for row in rows if (row["scales"], row["shape"]) == ("tensor", shape)}


def _spanned(low: float, high: float) -> Interval | None:
    """The interval of errors is what the draws spanned, none of a single draw."""
    return (low, high) if low < high else None


def _decode(findings: Findings, level: float, recipe: str) -> Quantity | None:
    """Its interval is 95 %."""
    for row in [] if findings.speed is None else findings.speed["rows"]:
        if (row["model"], row["kind"], row["batch"]) == (recipe, "batch", 1) and "decode_ratio" in row:
            return Quantity(f"{recipe} / bf16", row["decode_ratio"], row["decode_ratio_ci"])
    return None


MEASURES: dict[str, Callable[..., Quantity | None]] = {
    **{field: _text(field) for field in ("ppl", "ppl_fraction", "kl", "kl_fraction")},
    **{method: _accuracy(method, method) for method in ("direct", "generate")},
    "generate-direct": _accuracy("generate", "direct"),
    "mean-generate": _mean_generate,
    "overhead": _overhead,
    "rounding": _rounding,
    "documented": _documented,
    "decode": _decode,
}

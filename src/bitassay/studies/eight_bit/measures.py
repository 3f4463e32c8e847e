"""What the claims on INT8 and FP8 are about: accuracies, scales' bits, errors of products and speeds, as
quantities with intervals (`claims.py`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitassay.evaluation.statistics import difference_interval, logit_interval, mean_of
from bitassay.studies.claims import Measure, Quantity
from bitassay.studies.eight_bit.study import FORMATS
from bitassay.studies.variants import Findings


def accuracy_difference(
    found: Findings, first: tuple[str, str], second: tuple[str, str], level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """(variant, method) against (variant, method) on the same questions: the second's accuracy less the
    first's, and its interval at `level`."""
    a, b = (found.right[name][method] for name, method in (first, second))
    gained = sum(y and not x for x, y in zip(a, b, strict=True))
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    return (gained - lost) / len(a), difference_interval(gained, lost, len(a), level)


def accuracy(second: str, first: str, method: str, first_method: str | None = None) -> Measure:
    """Accuracy of `second` less that of `first`."""

    def measure(found: Findings, level: float) -> Quantity | None:
        a, b = found.called(first), found.called(second)
        if not found.has(a, b):
            return None
        sides = (a, first_method or method), (b, method)
        return Quantity(f"{b} - {a}", *accuracy_difference(found, *sides, level))

    return measure


def mean_accuracy(second: Sequence[str], first: Sequence[str], method: str) -> Measure:
    """Accuracy of `second` less that of `first`, pair by pair, in the mean over pairs; the interval is over
    questions, which all were asked alike."""

    def measure(found: Findings, level: float) -> Quantity | None:
        if not found.has(*first, *second):
            return None
        gained = np.mean(
            [
                np.subtract(found.right[b][method], found.right[a][method], dtype=float)
                for a, b in zip(first, second, strict=True)
            ],
            axis=0,
        )
        mean = mean_of(gained)
        name = f"mean of {len(first)} granularities"
        return Quantity(name, mean.value, logit_interval(mean, -1, 1, level))

    return measure


def overhead(variant: str) -> Measure:
    """What scales add to the 8 bits of a weight, a share; counted, so its interval is the number itself."""

    def measure(found: Findings, level: float) -> Quantity | None:
        bits = found.facts.get(variant, {}).get("bits_per_weight")
        return None if bits is None else Quantity(variant, bits / 8 - 1, (bits / 8 - 1, bits / 8 - 1))

    return measure


def rounding_ratio(shape: str) -> Measure:
    """FP8's rounding error of a matrix over INT8's, one scale for the tensor; its interval is what the draws
    spanned, none of a single draw."""

    def measure(found: Findings, level: float) -> Quantity | None:
        rows = {} if found.products is None else _products(found.products, shape)
        if not FORMATS.keys() <= rows.keys():
            return None
        (int_low, int_high), (low, high) = (rows[name]["rounding_error_range"] for name in ("int8", "fp8"))
        value = rows["fp8"]["rounding_error"] / rows["int8"]["rounding_error"]
        return Quantity(f"fp8 / int8 at {shape}", value, _spanned(low / int_high, high / int_low))

    return measure


def over_documented(shape: str, format: str) -> Measure:
    """The rounding error over what the document gives as the error of a product."""

    def measure(found: Findings, level: float) -> Quantity | None:
        row = {} if found.products is None else _products(found.products, shape).get(format, {})
        if not row.get("documented"):
            return None
        low, high = row["rounding_error_range"]
        given = row["documented"]
        return Quantity(f"{format} at {shape}", row["over_documented"], _spanned(low / given, high / given))

    return measure


def _spanned(low: float, high: float) -> tuple[float, float] | None:
    return (low, high) if low < high else None


def _products(products: dict[str, Any], shape: str) -> dict[str, Any]:
    return {
        row["format"]: row for row in products["rows"] if row["scales"] == "tensor" and row["shape"] == shape
    }


def decode_ratio(recipe: str) -> Measure:
    """Decoding speed over the base's, one sequence, within rounds; its interval is 95 %."""

    def measure(found: Findings, level: float) -> Quantity | None:
        rows = [] if found.speed is None else found.speed["rows"]
        for row in rows:
            if (row["model"], row["kind"], row["batch"]) == (recipe, "batch", 1) and "decode_ratio" in row:
                return Quantity(f"{recipe} / bf16", row["decode_ratio"], row["decode_ratio_ci"])
        return None

    return measure

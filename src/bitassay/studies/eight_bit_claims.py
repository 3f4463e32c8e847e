"""What the document on INT8 and FP8 claims (`claims.py` says how it is judged)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bitassay.evaluate.statistics import bootstrap_means, difference_interval, percentile_interval
from bitassay.studies.claims import LESS, MORE, Claim, Measure, Quantity, divergence, perplexity
from bitassay.studies.eight_bit import FORMATS, GRANULARITIES, EightBitFindings
from bitassay.studies.variants import BASE

SMOOTHED = (("int8", "torchao"), ("int8", "ours"), ("fp8", "ours"))


def accuracy_difference(
    found: EightBitFindings, first: tuple[str, str], second: tuple[str, str], level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """(variant, method) against (variant, method) on the same questions: the second's accuracy less the
    first's, and its interval at `level`."""
    a, b = (found.right[name][method] for name, method in (first, second))
    gained = sum(y and not x for x, y in zip(a, b, strict=True))
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    return (gained - lost) / len(a), difference_interval(gained, lost, len(a), level)


def accuracy(second: str, first: str, method: str, first_method: str | None = None) -> Measure:
    """Accuracy of `second` less that of `first`."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        a, b = found.called(first), found.called(second)
        if not found.has(a, b):
            return None
        sides = (a, first_method or method), (b, method)
        return Quantity(f"{b} - {a}", *accuracy_difference(found, *sides, level))

    return measure


def mean_accuracy(second: Sequence[str], first: Sequence[str], method: str) -> Measure:
    """Accuracy of `second` less that of `first`, pair by pair, in the mean over pairs; resampled are the
    questions, which all were asked alike."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        if not found.has(*first, *second):
            return None
        gained = np.mean(
            [
                np.subtract(found.right[b][method], found.right[a][method], dtype=float)
                for a, b in zip(first, second, strict=True)
            ],
            axis=0,
        )
        interval = None  # where all answers are equal, resampling says nothing of what others would be
        if gained.any():
            interval = percentile_interval(bootstrap_means(gained, found.plan.seed), len(gained), level)
        return Quantity(f"mean of {len(first)} granularities", float(gained.mean()), interval)

    return measure


def overhead(variant: str) -> Measure:
    """What scales add to the 8 bits of a weight, a share; counted, so its interval is the number itself."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        bits = found.facts.get(variant, {}).get("bits_per_weight")
        return None if bits is None else Quantity(variant, bits / 8 - 1, (bits / 8 - 1, bits / 8 - 1))

    return measure


def rounding_ratio(shape: str) -> Measure:
    """FP8's rounding error of a matrix over INT8's, one scale for the tensor; its interval is what the draws
    spanned."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        rows = {} if found.products is None else _products(found.products, shape)
        if not FORMATS.keys() <= rows.keys():
            return None
        (int_low, int_high), (low, high) = (rows[name]["rounding_error_range"] for name in ("int8", "fp8"))
        value = rows["fp8"]["rounding_error"] / rows["int8"]["rounding_error"]
        return Quantity(f"fp8 / int8 at {shape}", value, (low / int_high, high / int_low))

    return measure


def over_documented(shape: str, format: str) -> Measure:
    """The rounding error over what the document gives as the error of a product."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        row = {} if found.products is None else _products(found.products, shape).get(format, {})
        if not row.get("documented"):
            return None
        low, high = row["rounding_error_range"]
        given = row["documented"]
        return Quantity(f"{format} at {shape}", row["over_documented"], (low / given, high / given))

    return measure


def _products(products: dict[str, Any], shape: str) -> dict[str, Any]:
    return {
        row["format"]: row for row in products["rows"] if row["scales"] == "tensor" and row["shape"] == shape
    }


def decode_ratio(recipe: str) -> Measure:
    """Decoding speed over the base's, one sequence, within rounds; its interval is 95 %."""

    def measure(found: EightBitFindings, level: float) -> Quantity | None:
        rows = [] if found.speed is None else found.speed["rows"]
        for row in rows:
            if (row["model"], row["kind"], row["batch"]) == (recipe, "batch", 1) and "decode_ratio" in row:
                return Quantity(f"{recipe} / bf16", row["decode_ratio"], row["decode_ratio_ci"])
        return None

    return measure


def _others(best: str, variants: list[str], measure: Callable[[str, str], Measure]) -> tuple[Measure, ...]:
    """`best` against every other one."""
    return tuple(measure(best, other) for other in variants if other != best)


def _claims() -> Iterator[Claim]:
    fake = [f"{format}-{granularity}-fake" for format in FORMATS for granularity in GRANULARITIES]
    fp8 = [name for name in fake if name.startswith("fp8")]
    int8 = [name for name in fake if name.startswith("int8")]

    def generate(second: str, first: str) -> Measure:
        return accuracy(second, first, "generate")

    def both(second: str, first: str) -> tuple[Measure, ...]:
        return accuracy(second, first, "direct"), accuracy(second, first, "generate")

    one = "task3.1"
    yield Claim(
        one,
        "3.1.4",
        "INT8 is more accurate than FP8 in five of six granularities (all but per tensor)",
        "+0.90, +1.40, +0.20, +2.10, +1.20 points",
        MORE,
        tuple(generate(a, b) for a, b in zip(int8[1:], fp8[1:], strict=True)),
    )
    yield Claim(
        one,
        "3.1.4",
        "INT8 is more accurate than FP8 in the mean over granularities",
        "+0.95 points",
        MORE,
        (mean_accuracy(int8, fp8, "generate"),),
    )
    yield Claim(
        one,
        "3.1.4",
        "per tensor FP8 is more accurate than INT8",
        "+1.10 points",
        MORE,
        (generate(fp8[0], int8[0]),),
    )
    yield Claim(
        one,
        "3.1.4",
        "FP8 per tensor has the lowest perplexity of all",
        "33.00 beside 33.75 to 35.25",
        LESS,
        _others("fp8-tensor-fake", fake, perplexity),
        "perplexity",
    )
    yield Claim(
        one,
        "3.1.7",
        "INT8 in groups of 512 is the most accurate configuration",
        "50.90 beside 47.80 to 50.70 %",
        MORE,
        _others("int8-g512-fake", fake, generate),
    )
    yield Claim(
        one,
        "6.1",
        "INT8 in groups of 512 and INT8 per row exceed BF16: quantization can bring accuracy",
        "+0.30, +0.10 points",
        MORE,
        (generate("int8-g512-fake", BASE), generate("int8-row-fake", BASE)),
    )
    yield Claim(
        one,
        "3.1.5",
        "larger groups suit INT8: 512 beats 64",
        "+0.60 points",
        MORE,
        (generate("int8-g512-fake", "int8-g64-fake"),),
    )
    yield Claim(
        one,
        "3.1.7",
        "FP8 is the most accurate per tensor",
        "50.20 beside 47.80 to 49.80 %",
        MORE,
        _others("fp8-tensor-fake", fp8, generate),
    )
    yield Claim(
        one,
        "3.1.7",
        "FP8 suffers in groups, most of all of 256",
        "-2.80 points",
        LESS,
        (generate("fp8-g256-fake", BASE),),
    )
    yield Claim(
        one,
        "3.1.6",
        "a scale for the tensor keeps least precision, one for a row or group keeps more",
        "said of both formats",
        LESS,
        tuple(
            divergence(f"{format}-{finer}-fake", f"{format}-tensor-fake")
            for format in FORMATS
            for finer in ("row", "g128")
        ),
        "nats of KL",
    )
    for granularity, text, expected, within in (
        ("row", "a row add less than 0.1 %", "< 0.1 %", (-math.inf, 0.001)),
        ("g128", "groups of 128 add about 0.5 %", "0.5 %", (0.004, 0.006)),
        ("g64", "groups of 64 add about 1 %", "1 %", (0.008, 0.012)),
    ):
        yield Claim(
            one,
            "3.1.6",
            f"scales of {text} to 8 bits a weight",
            expected,
            within,
            (overhead(f"int8-{granularity}-fake"),),
            "%",
        )
    yield Claim(
        one,
        "6.3",
        "fake quantization keeps perplexity within 5 % of BF16",
        "-2.22 to +4.44 %",
        (-0.05, 0.05),
        tuple(perplexity(name, BASE, fraction=True) for name in fake),
        "%",
    )
    yield Claim(
        one,
        "6.2",
        "real INT8 per row is more accurate than real FP8 per row",
        "+1.50 points",
        MORE,
        (accuracy("int8-row-real", "fp8-row-real", "direct"),),
    )

    two, shapes = "task3.2", ("16x512", "100x1024", "4096x4096")
    yield Claim(
        two,
        "4.5",
        "INT8 per row is clearly more accurate than FP8 per row",
        "+2.50 direct, +2.00 generate",
        MORE,
        both("int8-row-fake", "fp8-row-fake"),
    )
    yield Claim(
        two,
        "4.2",
        "asked by text, accuracy falls by at most 1 point",
        "-1.00 to +0.50 points",
        (-0.01, math.inf),
        tuple(
            accuracy(name, name, "generate", "direct")
            for name in (BASE, *(f"{f}-{g}-fake" for f in FORMATS for g in ("tensor", "row", "g128")))
        ),
    )
    yield Claim(
        two,
        "4.4",
        "FP8's error is 2 to 3 times INT8's",
        "2.31, 2.10, 1.69",
        (2.0, 3.0),
        tuple(rounding_ratio(shape) for shape in shapes),
        "ratio",
    )
    yield Claim(
        two,
        "4.4",
        "INT8's error is 0.0096 to 0.0133, FP8's 0.0222 to 0.0225 (within 10 %)",
        "1.00 of itself",
        (0.9, 1.1),
        tuple(over_documented(shape, format) for shape in shapes for format in FORMATS),
        "ratio",
    )
    yield Claim(
        two,
        "4.5",
        "FP8 is what gives throughput: it decodes faster than BF16",
        "not measured there",
        (1.0, math.inf),
        (decode_ratio("fp8-row"),),
        "ratio",
    )

    three = "task3.3"
    yield Claim(
        three,
        "5.2.1",
        "with SmoothQuant, FP8 has a lower perplexity than INT8",
        "17.02 beside 18.44",
        LESS,
        (perplexity("fp8-smooth-ours", "int8-smooth-ours"),),
        "perplexity",
    )
    yield Claim(
        three,
        "5.2.2",
        "with SmoothQuant, FP8 is more accurate than INT8",
        "+1.00 points",
        MORE,
        both("fp8-smooth-ours", "int8-smooth-ours"),
    )
    yield Claim(
        three,
        "5.3",
        "direct and generate give the same accuracy (within half a point)",
        "0.00 points",
        (-0.005, 0.005),
        tuple(
            accuracy(f"{f}-smooth-{tool}", f"{f}-smooth-{tool}", "generate", "direct") for f, tool in SMOOTHED
        ),
    )
    for tool in ("torchao", "ours"):
        yield Claim(
            three,
            "5.3",
            f"SmoothQuant raises accuracy ({tool}; the document compares two different models)",
            "53.50 and 54.50 beside 51.60 %",
            MORE,
            tuple(m for f, t in SMOOTHED if t == tool for m in both(f"{f}-smooth-{tool}", f"{f}-{tool}")),
        )
    yield Claim(
        three,
        "-",
        "smoothing brings INT8 nearer to BF16 (not in the document)",
        "-",
        LESS,
        (divergence("int8-smooth-ours", "int8-ours"), divergence("int8-smooth-torchao", "int8-torchao")),
        "nats of KL",
    )
    yield Claim(
        three,
        "-",
        "torchao's smoothed INT8 and ours are equally near to BF16, within 0.001 nats (not in the document)",
        "-",
        (-0.001, 0.001),
        (divergence("int8-smooth-torchao", "int8-smooth-ours"),),
        "nats of KL",
    )


CLAIMS = tuple(_claims())

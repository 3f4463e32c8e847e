"""What the INT8/FP8 report claims (`claims.py` says how it is judged)."""

import math
from collections.abc import Callable, Iterator

from bitassay.quantization.recipe.recipe import BASE
from bitassay.studies.claims import LESS, MORE, Claim, Measure, divergence, perplexity
from bitassay.studies.eight_bit.measures import (
    accuracy,
    decode_ratio,
    mean_accuracy,
    over_documented,
    overhead,
    rounding_ratio,
)
from bitassay.studies.eight_bit.study import FORMATS, GRANULARITIES

SMOOTHED = (("int8", "torchao"), ("int8", "ours"), ("fp8", "ours"))


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
            f"SmoothQuant raises accuracy ({tool}; the report compares two different models)",
            "53.50 and 54.50 beside 51.60 %",
            MORE,
            tuple(m for f, t in SMOOTHED if t == tool for m in both(f"{f}-smooth-{tool}", f"{f}-{tool}")),
        )
    yield Claim(
        three,
        "-",
        "smoothing brings INT8 nearer to BF16 (not in the report)",
        "-",
        LESS,
        (divergence("int8-smooth-ours", "int8-ours"), divergence("int8-smooth-torchao", "int8-torchao")),
        "nats of KL",
    )
    yield Claim(
        three,
        "-",
        "torchao's smoothed INT8 and ours are equally near to BF16, within 0.001 nats (not in the report)",
        "-",
        (-0.001, 0.001),
        (divergence("int8-smooth-torchao", "int8-smooth-ours"),),
        "nats of KL",
    )


CLAIMS = tuple(_claims())

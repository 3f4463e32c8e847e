"""Verdicts on claims: what an interval supports, and nothing more."""

import math

import pytest
import torch

from bitassay.evaluation.divergence import TokenScores
from bitassay.studies.claims import RANGES, Quantity, judged, verdict
from bitassay.studies.eight_bit.run import CLAIMS
from bitassay.studies.eight_bit.study import GRANULARITIES, STUDIES, eight_bit_plan
from bitassay.studies.variants import Findings

MORE, LESS = RANGES["more"], RANGES["less"]
SUPPORTED, NOT, OPEN = "supported", "not supported", "not decidable at this n"


def quantity(low, high):
    return Quantity("q", (low + high) / 2, (low, high))


@pytest.mark.parametrize(
    ("intervals", "within", "wanted"),
    [
        ([(0.01, 0.03)], MORE, SUPPORTED),
        ([(-0.01, 0.03)], MORE, OPEN),
        ([(-0.03, -0.01)], MORE, NOT),
        ([(0.0, 0.03)], MORE, OPEN),
        ([(0.0, 0.0)], MORE, NOT),
        ([(-0.03, 0.0)], MORE, NOT),
        ([(-0.03, -0.01)], LESS, SUPPORTED),
        ([(-0.02, 0.04)], (-0.05, 0.05), SUPPORTED),
        ([(-0.02, 0.06)], (-0.05, 0.05), OPEN),
        ([(0.06, 0.07)], (-0.05, 0.05), NOT),
        ([(0.01, 0.03), (-0.01, 0.03)], MORE, OPEN),
        ([(0.01, 0.03), (0.02, 0.03)], MORE, SUPPORTED),
        ([(0.01, 0.03), (-0.02, -0.01)], MORE, NOT),
        ([], MORE, OPEN),
    ],
)
def test_the_rule(intervals, within, wanted):
    assert verdict([quantity(*pair) for pair in intervals], within) == wanted


def test_without_an_interval_nothing_is_decided():
    assert verdict([Quantity("q", 5.0, None)], MORE) == OPEN
    assert verdict([Quantity("q", 5.0, None), quantity(-2, -1)], MORE) == NOT


def findings(study, right):
    """What questions were answered rightly by variants, the same by either method."""
    plan = eight_bit_plan(study, "stories260k", 8)
    variants = {variant.name: variant for variant in plan.variants}
    given = {name: right.get(name, right["bf16"]) for name in variants}
    return Findings(plan, variants, right={n: {"direct": r, "generate": r} for n, r in given.items()})


def claim(found, words):
    [row] = [row for row in judged(found, CLAIMS[found.plan.study]) if words in row["claim"]]
    return row


def test_a_claim_turns_round_with_what_was_answered():
    """400 questions: INT8 in groups of 512 loses or gains 40 of them."""
    half = [True] * 200 + [False] * 200
    better, worse = [True] * 240 + [False] * 160, [True] * 160 + [False] * 240
    words = "larger groups suit INT8"
    assert claim(findings("task3.1", {"bf16": half}), words)["verdict"] == OPEN
    row = claim(findings("task3.1", {"bf16": half, "int8-g512-fake": better}), words)
    assert (row["verdict"], row["measured"][0]["value"]) == (SUPPORTED, 0.1)
    assert claim(findings("task3.1", {"bf16": half, "int8-g512-fake": worse}), words)["verdict"] == NOT


def test_the_best_of_many_needs_all_comparisons_and_wider_intervals():
    half = [True] * 200 + [False] * 200
    better = [True] * 240 + [False] * 160
    right = {"bf16": half, "int8-g512-fake": better}
    row = claim(findings("task3.1", right), "the most accurate configuration")
    assert row["verdict"] == SUPPORTED
    assert len(row["measured"]) == 11
    alone = claim(findings("task3.1", right), "larger groups suit INT8")["measured"][0]["interval"]
    of_many = row["measured"][0]["interval"]
    assert of_many[0] < alone[0] < alone[1] < of_many[1]
    equal = findings("task3.1", right | {"fp8-g64-fake": better})
    assert claim(equal, "the most accurate configuration")["verdict"] == OPEN


def test_scales_are_counted():
    found = findings("task3.1", {"bf16": [True, False]})
    found.facts = {
        f"int8-{g}-fake": {"bits_per_weight": 8 + 16 / n} for g, n in (("row", 4096), ("g128", 128))
    }
    assert claim(found, "groups of 128 add")["verdict"] == NOT
    assert claim(found, "groups of 128 add")["measured"][0]["value"] == 1 / 64
    assert claim(found, "a row add")["verdict"] == SUPPORTED
    assert claim(found, "groups of 64 add")["verdict"] == OPEN


def test_a_mean_over_granularities_is_paired_by_question():
    half, better = [True] * 200 + [False] * 200, [True] * 240 + [False] * 160
    words = "in the mean over granularities"
    right = {"bf16": half} | {f"int8-{g}-fake": better for g in GRANULARITIES}
    row = claim(findings("task3.1", right), words)
    assert (row["verdict"], row["measured"][0]["value"]) == (SUPPORTED, pytest.approx(0.1))
    low, high = row["measured"][0]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * (0.1 * 0.9 / 400) ** 0.5, rel=0.05)
    assert claim(findings("task3.1", {"bf16": half}), words)["verdict"] == OPEN


def test_what_was_not_measured_supports_nothing():
    row = claim(findings("task3.1", {"bf16": [True, False]}), "lowest perplexity")
    assert (row["verdict"], row["measured"], row["not_measured"]) == (OPEN, [], 11)


def test_products_and_speed_are_judged():
    found = findings("task3.2", {"bf16": [True, False]})

    def rows(fp8):
        return [
            {
                "shape": shape,
                "format": format,
                "scales": "tensor",
                "rounding_error": value,
                "documented": value,
            }
            | {"over_documented": 1.0, "rounding_error_range": [value * 0.99, value * 1.01]}
            for shape in ("16x512", "100x1024", "4096x4096")
            for format, value in (("int8", 0.01), ("fp8", fp8))
        ]

    found.products = {"rows": rows(0.025)}
    found.speed = {
        "rows": [
            {
                "model": "fp8-row",
                "kind": "batch",
                "batch": 1,
                "decode_ratio": 0.5,
                "decode_ratio_ci": (0.4, 0.6),
            }
        ]
    }
    assert claim(found, "2 to 3 times")["verdict"] == SUPPORTED
    assert claim(found, "0.0096 to 0.0133")["verdict"] == SUPPORTED
    assert claim(found, "gives throughput")["verdict"] == NOT
    found.products = {"rows": rows(0.015)}
    assert claim(found, "2 to 3 times")["verdict"] == NOT


def test_every_claim_names_variants_that_there_are():
    """Measured or not, no claim looks for a variant under a name that its study does not have."""
    score = TokenScores(torch.rand(4), torch.rand(4), torch.ones(4, dtype=torch.bool))
    for study in STUDIES:
        found = findings(study, {"bf16": [True, False]})
        found.text = dict.fromkeys(found.variants, [score] * 3)
        found.facts = {name: {"bits_per_weight": 8.0} for name in found.variants}
        rows = judged(found, CLAIMS[found.plan.study])
        assert len(rows) == len(CLAIMS[study]) > 3
        for row in rows:
            if row["unit"] != "ratio":  # those are of products and speeds, above
                assert row["not_measured"] == 0, row["claim"]
    assert all(
        low < high and not math.isnan(low)
        for claims in CLAIMS.values()
        for low, high in (claim.range for claim in claims)
    )

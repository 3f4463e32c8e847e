"""What follows from statistics: which test sees what, and that honest servers are refused at most so often."""

from datetime import UTC, datetime, timedelta

import numpy as np

from bitassay.audit.judge import AuditProfile, answer_p_value, decide, ledger_evidence
from bitassay.verification.ledger import Line
from bitassay.verification.trace import ModelClaim

CLAIM = ModelClaim(name="m", weights_digest="0" * 64, tokenizer_digest="0" * 64, recipe_id=None)


def profile(scores, level="chosen"):
    now = datetime.now(UTC)
    return AuditProfile(
        reference=CLAIM, level=level, form="ids", k=1, positions=8, corpus="c", servers=("http://a/v1",),
        scores=tuple(map(float, scores)), created=now, expires=now + timedelta(days=1),
    )  # fmt: skip


def test_few_bad_answers_are_counted_and_many_slight_ones_summed():
    draw = np.random.default_rng(3)
    known = profile(draw.normal(size=199))
    rare = draw.normal(size=64)
    rare[:7] += 50
    found = decide(rare.tolist(), 0, known, 0.01)
    assert found["status"] == "FAIL"
    assert found["tests"]["count"]["p_value"] <= 0.005 < found["tests"]["set"]["p_value"]
    slight = decide((draw.normal(size=64) + 1).tolist(), 0, known, 0.01)
    assert slight["status"] == "FAIL"
    assert slight["tests"]["set"]["p_value"] <= 0.005
    assert {test["level"] for test in slight["tests"].values()} == {0.005}
    one = decide([50.0], 0, known, 0.01)
    assert one["status"] == "FAIL"
    assert one["tests"] == {"set": {"p_value": 0.005, "level": 0.01}}
    assert decide([50.0] * 5, 0, None, 0.01)["status"] == "INCONCLUSIVE"
    assert decide([0.0], 5, known, 0.01)["status"] == "INCONCLUSIVE"


def test_sampled_tokens_are_refused_on_both_sides():
    draw = np.random.default_rng(5)
    known = profile(draw.normal(size=199), "sampled")
    for sign, name in ((1, "set"), (-1, "set below")):
        found = decide((sign * (draw.normal(size=64) + 1)).tolist(), 0, known, 0.01)
        assert found["status"] == "FAIL"
        assert found["tests"][name]["p_value"] <= found["tests"][name]["level"] == 0.0025
    assert decide(draw.normal(size=64).tolist(), 0, known, 0.01)["status"] == "PASS"
    assert decide((draw.normal(size=64) - 1).tolist(), 0, profile(known.scores), 0.01)["status"] == "PASS"
    low = answer_p_value(-50.0, known)
    assert low == answer_p_value(50.0, known) == 2 / 200
    assert answer_p_value(-50.0, profile(known.scores)) == 1


def test_a_ledger_of_sampled_tokens_has_both_sides():
    draw = np.random.default_rng(6)
    known = profile(draw.normal(size=99), "sampled")
    now = datetime.now(UTC)
    for shift in (-3, 3):
        names = [f"{n:064x}" for n in range(12)]
        lines = [
            Line(request=name, prompt=name, output=name, score=draw.normal() + shift, limit=8, time=now)
            for name in names
        ]
        found = ledger_evidence(lines, known, 0.01)
        assert found is not None
        assert found.p_value <= 0.01
    one_sided = ledger_evidence(lines, profile(known.scores), 0.01)
    assert one_sided is not None
    assert found.p_value == 2 * one_sided.p_value


def test_honest_servers_are_refused_at_most_so_often():
    draw = np.random.default_rng(4)
    refused = [
        decide(draw.normal(size=12).tolist(), 0, profile(draw.normal(size=59)), 0.05)["status"] == "FAIL"
        for _ in range(400)
    ]
    assert np.mean(refused) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert any(refused)

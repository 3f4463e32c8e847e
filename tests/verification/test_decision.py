"""The decision about a call: an honest host is refused with a probability of at most alpha, whatever is
tested."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from bitassay.verification.decision import SEQUENCE, UNDECIDED, decision
from bitassay.verification.ledger import BUDGET, Item, extended, score_evidence, undecided_evidence
from bitassay.verification.pooled import fail_count_p_value
from bitassay.verification.scores import p_value
from bitassay.verification.structure import Reason
from bitassay.verification.verdict import Verdict

LIMIT = 11


def judged(score, honest, alpha):
    if score is None:
        return Verdict("INCONCLUSIVE", (Reason("too-few-tokens", "3 generated positions"),), "m", 4)
    p = p_value(score, honest)
    status, code = ("FAIL", "states-too-far") if p <= alpha else ("PASS", "as-honest")
    options = {"p_value": p, "alpha": alpha, "profile": "a", "n_calibration": len(honest), "limit": LIMIT}
    return Verdict(status, (Reason(code, code),), "m", 12, **options)


def call(scores, honest, alpha, earlier=None, **options):
    """The decision about requests with these scores (None: undecided by the host) after those of a ledger."""
    profile = SimpleNamespace(honest_scores=lambda limit: honest)
    every = [*(earlier or []), *scores]
    names = [f"{index:064x}" for index in range(len(every))]
    items = [
        Item(request=name, prompt=name, undecided="too-few-tokens")
        if score is None
        else Item(request=name, prompt=name, output=name, score=score, limit=LIMIT)
        for name, score in zip(names, every, strict=True)
    ]
    lines = extended([], items)
    verdicts = [judged(score, honest, alpha) for score in scores]
    return decision(
        verdicts,
        [verdict for verdict in verdicts if verdict.p_value is not None],
        score_evidence(lines, profile, SEQUENCE * alpha),
        undecided_evidence(lines, BUDGET, UNDECIDED * alpha),
        [],
        alpha,
        BUDGET,
        with_ledger=earlier is not None,
        **options,
    )


def refused(rng, calls, n, k, alpha, shift=0.0, undecided=0.0, earlier=None):
    """The share of simulated hosts that are refused."""
    count = 0
    for _ in range(calls):
        honest = rng.normal(size=n).tolist()
        scores = [None if rng.random() < undecided else x for x in (shift + rng.normal(size=k)).tolist()]
        before = None if earlier is None else rng.normal(size=earlier).tolist()
        count += call(scores, honest, alpha, before).status == "FAIL"
    return count / calls


def at_most(alpha, calls):
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / calls)


@pytest.mark.parametrize(("undecided", "earlier"), [(0.0, None), (BUDGET, None), (0.0, 15)])
def test_an_honest_host_is_refused_with_at_most_alpha(undecided, earlier):
    rate = refused(np.random.default_rng(1), 250, 39, 16, 0.2, undecided=undecided, earlier=earlier)
    assert 0 < rate <= at_most(0.2, 250)


@pytest.mark.slow
def test_2000_honest_calls_with_40_traces():
    """As a default profile has them. Of calls that fail with their first FAIL, 28 % would."""
    rng = np.random.default_rng(2)
    assert refused(rng, 2000, 219, 40, 0.01, undecided=BUDGET / 2) <= at_most(0.01, 2000)
    some = [(rng.normal(size=219), rng.normal(size=40)) for _ in range(300)]
    alone = [min(p_value(x, honest.tolist()) for x in new) <= 0.01 for honest, new in some]
    assert np.mean(alone) > 0.2


def test_a_host_that_is_off_is_refused():
    rng = np.random.default_rng(3)
    assert refused(rng, 15, 99, 40, 0.01, shift=1.5) == 1
    assert refused(rng, 15, 99, 40, 0.01, undecided=0.6) == 1


def test_a_host_that_cheats_rarely_and_badly_is_refused_by_its_single_fails():
    rng = np.random.default_rng(4)
    honest = rng.normal(size=219).tolist()
    scores = [*rng.normal(size=34).clip(max=1).tolist(), *[9.0] * 6]
    found = call(rng.permutation(scores).tolist(), honest, 0.01)
    assert found.status == "FAIL"
    assert "single fails" in found.why


def test_the_count_of_single_fails_is_exact():
    """By simulation, and for one trace its own p-value's level."""
    rng, alpha, n, k = np.random.default_rng(5), 0.1, 29, 12
    p_values = []
    for _ in range(1500):
        drawn = rng.normal(size=n + k)
        verdicts = [judged(x, drawn[:n].tolist(), alpha) for x in drawn[n:].tolist()]
        p_values.append(fail_count_p_value(verdicts, alpha))
    for level in sorted(set(p_values)):
        share = np.mean(np.array(p_values) <= level)
        assert stats.binomtest(round(share * 1500), 1500, min(level, 1.0)).pvalue > 1e-4
    honest = list(range(29))
    assert fail_count_p_value([judged(99.0, honest, alpha)], alpha) == pytest.approx(3 / 30)
    assert fail_count_p_value([judged(-1.0, honest, alpha)], alpha) == 1
    assert fail_count_p_value([], alpha) == 1


HONEST = list(np.linspace(-2, 2, 99))


def test_of_one_trace_its_own_verdict_decides():
    for score, status in ((0.0, "PASS"), (9.0, "FAIL"), (None, "INCONCLUSIVE")):
        found = call([score], HONEST, 0.01)
        assert (found.status, found.why) == (status, judged(score, HONEST, 0.01).reasons[0].sentence)
    assert call([9.0], HONEST, 0.02, earlier=[]).status == "FAIL", "with a ledger at half of alpha"
    assert call([9.0], HONEST, 0.01, earlier=[]).status == "PASS"


def test_one_fail_of_many_decides_nothing_and_structure_always_does():
    assert call([*np.linspace(-2, 1, 30), 9.0], HONEST, 0.01).status == "PASS"
    forged = Verdict("FAIL", (Reason("truncated", "cut"),), "m", 0)
    good = [judged(0.0, HONEST, 0.01)] * 30
    found = decision([*good, forged], good, None, None, [], 0.01, BUDGET)
    assert (found.status, found.why) == ("FAIL", "1 of 31 fail exact checks: cut")
    assert str(found) == "FAIL because 1 of 31 fail exact checks: cut"


def test_undecided_requests_within_the_budget_do_not_stop_a_pass():
    scores = np.linspace(-2, 1, 30).tolist()
    assert call([*scores, None, None, None], HONEST, 0.01).status == "PASS"
    found = call([*scores[:4], None], HONEST, 0.01)
    assert (found.status, found.why) == (
        "INCONCLUSIVE",
        "1 of 5 requests have no decision: 3 generated positions",
    )
    assert call([None, None], HONEST, 0.01).status == "INCONCLUSIVE"
    assert call(scores, HONEST, 0.01, unanswered=4).status == "INCONCLUSIVE"
    own = dataclasses.replace(judged(None, HONEST, 0.01), reasons=(Reason("no-profile", "none"),))
    good = [judged(score, HONEST, 0.01) for score in scores]
    assert decision([*good, own], good, None, None, [own], 0.01, BUDGET).status == "INCONCLUSIVE"
    assert decision([], [], None, None, [], 0.01, BUDGET).status == "INCONCLUSIVE"


def test_plain_values_name_each_test():
    found = call([0.0, 0.5, None], HONEST, 0.08).to_dict()
    levels = {"set": 0.03, "single fails": 0.01, "sequence": 0.03, "too-many-undecided": 0.01}
    assert {name: test["level"] for name, test in found["tests"].items()} == pytest.approx(levels)

"""Attacks on receipts and of lazy verifiers: honest parties pass the same checks, each attack is caught for its
own reason, and grinding gains what the formula says."""

import hashlib
import inspect
import math
from collections import Counter
from dataclasses import replace

import pytest

from bitassay.verification.attacks import forgeries
from bitassay.verification.attacks.attack import LISTED, Setting
from bitassay.verification.attacks.forgeries import (
    HOST,
    VERIFIERS,
    _rounds,
    ask,
    bad_positions,
    exchange,
    grind,
    n_bad_opened,
)
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.committee.rounds import judge
from bitassay.verification.observe import observe
from bitassay.verification.receipts.challenge import opened_positions
from bitassay.verification.receipts.receipt import commit
from bitassay.verification.structure import Request
from bitassay.verification.submissions import CommitteeRound, check_submission

CAUGHT = {
    "receipt-tampered": {"bad-signature"},
    "receipt-other-key": {"other-signer"},
    "receipt-replayed": {"other-prompt", "other-nonce"},
    "receipt-second": {"other-receipt"},
    "root-forged": {"other-root"},
    "root-reordered": {"other-root"},
    "opening-withheld": {"withheld-opening"},
    "opening-other-cells": {"other-root", "wrong-shape"},
    "opening-other-states": {"other-root"},
    "opening-older": {"other-challenge"},
    "beacon-chosen": {"other-challenge"},
    "commitment-ground": set(),
    "verifier-passes-all": {"missed-planted-failure"},
    "verifier-fails-all": {"refused-planted-honest"},
    "verifier-copies": {"missed-planted-failure"},
    "verifier-copies-commitment": {"other-report"},
    "verifier-waits": {"other-report"},
}


@pytest.fixture(scope="module")
def setting(model, honest):
    return Setting(model, honest[:8])


def requests(setting):
    return [
        Request(prompt, nonce, setting.sampler, setting.max_new_tokens)
        for prompt, nonce in zip(setting.prompts, setting.nonces, strict=True)
    ]


def found(submissions, setting):
    pairs = zip(submissions, requests(setting), strict=True)
    checked = [check_submission(one, setting.model, request) for one, request in pairs]
    return [{reason.code for reason in result.defects} for result in checked]


def test_every_attack_is_in_the_table():
    def module_of(attack):
        return inspect.getclosurevars(inspect.unwrap(attack.run)).nonlocals["function"].__module__

    listed = {name for name, attack in LISTED.items() if module_of(attack) == forgeries.__name__}
    assert set(CAUGHT) == listed
    assert {name for name in CAUGHT if not ATTACKS[name].structural} == {"commitment-ground"}


@pytest.mark.parametrize("name", CAUGHT)
def test_each_is_caught_every_time_for_its_own_reason(name, setting):
    for defects in found(ATTACKS[name].run(setting), setting):
        assert defects <= CAUGHT[name]
        assert bool(defects) == bool(CAUGHT[name])


def test_the_same_steps_taken_honestly_have_no_defect(setting):
    assert found([exchange(trace) for trace in setting.honest], setting) == [set()] * 8
    assert found(_rounds(setting), setting) == [set()] * 8


@pytest.mark.parametrize("name", [name for name in CAUGHT if name.startswith("verifier")])
def test_no_honest_verifier_is_accused_beside_a_lazy_one(name, setting):
    for one in ATTACKS[name].run(setting):
        assert isinstance(one, CommitteeRound)
        judged = judge(one.round, one.assignments, one.commitments, one.revealed)
        assert {who for who, reasons in judged.items() if reasons} == {VERIFIERS[0]}


def test_an_honest_answer_shows_the_distances_of_the_whole_trace(setting):
    """At the opened positions, and margins of all tokens."""
    answers = [exchange(trace) for trace in setting.honest]
    whole = observe(setting.honest, setting.model, requests(setting))
    for trace, answer, part, all_of_it in zip(
        setting.honest, answers, observe(answers, setting.model, requests(setting)), whole, strict=True
    ):
        opened = [
            position - trace.n_prompt
            for position in opened_positions(answer.challenge, trace.header)
            if position >= trace.n_prompt
        ]
        assert 0 < len(opened) < trace.n_tokens - 1
        for mine, full in zip(part.series["distance"], all_of_it.series["distance"], strict=True):
            assert mine.values == tuple(full.values[index] for index in opened)
        margins = [one.series["token-difr"][0].values for one in (part, all_of_it)]
        assert margins[0] == pytest.approx(margins[1], abs=0.05)


def test_ground_commitments_are_seen_by_their_states(setting):
    ground = observe(ATTACKS["commitment-ground"].run(setting), setting.model, requests(setting))
    honest = observe([exchange(trace) for trace in setting.honest], setting.model, requests(setting))
    for one, other in zip(ground, honest, strict=True):
        assert one.defects == ()
        assert max(one.series["distance"][-1].values) > max(other.series["distance"][-1].values) + 1


def beacon(word):
    return hashlib.sha256(word.encode()).digest()


@pytest.fixture(scope="module")
def long(honest):
    """Six bad positions of eleven; six are opened."""
    trace = max(honest, key=lambda one: one.n_tokens)
    bad = bad_positions(trace)
    assert (trace.n_tokens - 1, len(bad)) == (11, 6)
    assert (
        len(
            [
                at
                for at in opened_positions(ask(commit(trace, HOST), beacon("")), trace.header)
                if at >= trace.n_prompt
            ]
        )
        == 6
    )
    return trace, bad


def test_grinding_for_a_beacon_that_is_foreseen_gains(long):
    """By chance 3.3 bad positions are opened, and 2 or fewer in a sixth of all draws: 20 tries get there."""
    trace, bad = long
    for word in ("one", "two", "three", "four", "five"):
        ground, fewest = grind(trace, beacon(word), 20)
        assert fewest == n_bad_opened(ask(commit(ground, HOST), beacon(word)), trace.header, bad) <= 2


def test_grinding_for_another_beacon_than_the_one_that_comes_gains_nothing(long):
    """The mean over fresh beacons is that of a host which does not grind, the hypergeometric 6 * 6 / 11."""
    trace, bad = long
    ground, _ = grind(trace, beacon("foreseen"), 100)
    signed = commit(ground, HOST)
    draws = [n_bad_opened(ask(signed, beacon(f"fresh {i}")), trace.header, bad) for i in range(600)]
    sd = (6 * 6 / 11 * 5 / 11 * 5 / 10) ** 0.5
    assert sum(draws) / 600 == pytest.approx(36 / 11, abs=4 * sd / 600**0.5)
    assert min(draws) >= 1


def test_how_many_commitments_it_takes_when_the_beacon_is_foreseen(long):
    """Two bad positions of 11, 6 of them opened: C(9, 6) / C(11, 6) = 2 / 11 of all commitments miss both."""
    trace, _ = long
    bad = trace.header.positions[-2:]
    trials, missed = 800, Counter()
    signed = commit(trace, HOST)
    for index in range(trials):
        other = replace(signed, root=beacon(f"root {index}"))
        missed[n_bad_opened(ask(other, beacon("foreseen")), trace.header, bad) == 0] += 1
    p = math.comb(9, 6) / math.comb(11, 6)
    assert missed[True] / trials == pytest.approx(p, abs=4 * (p * (1 - p) / trials) ** 0.5)

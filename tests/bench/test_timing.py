"""Turns, ratios and spreads, with times that are made up."""

import copy
import math
import time

import pytest
import torch
from scipy import stats

from bitassay.bench.timing import alternate, ratio_of, spread, throughput, turns


def test_a_ratio_is_taken_within_rounds():
    """A neighbour that slows a whole round by any factor changes nothing."""
    calm = ratio_of([2.0, 2.2, 1.8], [1.0, 1.0, 1.0])
    busy = ratio_of([2.0, 22.0, 180.0], [1.0, 10.0, 100.0])
    assert calm.value == pytest.approx((2 * 2.2 * 1.8) ** (1 / 3))
    assert (busy.value, busy.interval) == (pytest.approx(calm.value), pytest.approx(calm.interval))


def test_the_interval_is_students():
    logs = [0.1, 0.3, 0.2, 0.6]
    found = ratio_of([math.exp(x) for x in logs], [1.0] * 4)
    low, high = stats.t.interval(0.95, 3, loc=0.3, scale=stats.sem(logs))
    assert found.interval == pytest.approx((math.exp(low), math.exp(high)))


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_have_no_interval(rounds):
    assert ratio_of([3.0, 4.0][:rounds], [1.0] * rounds).interval is None


def test_wild_rounds_stay_finite():
    assert all(map(math.isfinite, ratio_of([1e-9, 1e9, 1.0], [1.0, 1.0, 1.0]).interval))
    assert ratio_of([1e-200, 1e200, 1.0], [1.0, 1.0, 1.0]).interval is None


def test_spread():
    assert spread([1.0, 2.0, 4.0]) == 1.5
    assert spread([2.0]) is None  # not 0: nothing was repeated


def test_each_round_begins_with_another():
    assert [turns(["a", "b", "c"], n) for n in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_short_work_is_repeated_within_a_measurement():
    now, log = [0.0], []

    def work(name, seconds):
        def run():
            log.append(name)
            now[0] += seconds

        return run

    found = alternate(
        {"long": work("long", 1.0), "short": work("short", 0.02)}, rounds=2, seconds=0.1, clock=lambda: now[0]
    )
    assert found == {"long": pytest.approx([1, 1]), "short": pytest.approx([0.02, 0.02])}
    assert log[-12:] == ["long"] + ["short"] * 5 + ["short"] * 5 + [
        "long"
    ]  # the second round begins with short
    assert log.count("long") == 1 + 2  # one warm-up says enough


def test_a_slower_model_measures_slower_and_each_is_fully_timed(stories):
    prompt = torch.randint(3, 500, (40,))
    slowed = copy.deepcopy(stories)
    slowed.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    found = throughput({"plain": lambda: stories, "slow": lambda: slowed}, prompt, decode_tokens=4, repeats=2)
    slow = found["slow"]
    assert 4 / slow["decode_tok_s"] >= 4 * 0.05
    assert 40 / slow["prefill_tok_s"] >= 0.05
    assert found["plain"]["decode_tok_s"] > slow["decode_tok_s"]
    assert [slow[key] for key in ("prompt_tokens", "decode_tokens", "repeats")] == [40, 4, 2]

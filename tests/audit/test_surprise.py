"""Sampled tokens: moments by hand, honest samples are not surprising, and each other way of sampling is."""

import numpy as np
import pytest

from bitassay.audit.distance import CAP
from bitassay.audit.surprise import RIM, Rule, surprises, unlikeliness


def log_softmax(values):
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


ROW = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))


def test_moments_by_hand():
    found, mean, variance = surprises([1], ROW, Rule(1.0, 0.8))
    s, q = -ROW[0, :2], np.array([0.5, 0.3]) / 0.8
    assert found == pytest.approx(-ROW[0, 1])
    assert mean == pytest.approx(q @ s)
    assert variance == pytest.approx(q @ s**2 - (q @ s) ** 2)
    assert unlikeliness([1], ROW, Rule(1.0, 0.8)) == pytest.approx(-np.log(0.3 / 0.8))
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert unlikeliness([2], ROW, Rule(0.5, 1.0)) == pytest.approx(-np.log(cold[2] / cold.sum()))


def test_tokens_outside_the_nucleus_are_as_surprising_as_can_be_but_not_on_its_rim():
    assert surprises([3], ROW, Rule(1.0, 0.8))[0] == CAP
    assert unlikeliness([3], ROW, Rule(1.0, 0.8)) == CAP
    on_the_rim = surprises([2], ROW, Rule(1.0, 0.8 - RIM / 2))[0]
    assert on_the_rim == pytest.approx(-ROW[0, 2])


def test_a_nucleus_smaller_than_one_token_keeps_it():
    found, mean, variance = surprises([0], ROW, Rule(1.0, 0.1))
    assert (found[0], variance[0]) == pytest.approx((mean[0], 0))


def scores(asked, drawn, answers=60, positions=24):
    """Of answers that are drawn by one rule and judged by another: z, signed."""
    draw, found = np.random.default_rng(1), []
    for _ in range(answers):
        rows = log_softmax(2 * draw.normal(size=(positions, 50)))
        tokens = []
        for row in rows:
            order = np.argsort(-row)
            q = np.exp(row[order] / drawn.temperature)
            q = q / q.sum()
            q[np.cumsum(q) - q >= drawn.top_p] = 0
            tokens.append(int(order[draw.choice(50, p=q / q.sum())]))
        s, mean, variance = surprises(tokens, rows, asked)
        found.append((s - mean).sum() / variance.sum() ** 0.5)
    return np.array(found)


def test_honest_samples_have_mean_0_and_spread_1_and_others_have_not():
    asked = Rule(1.0, 0.9)
    honest = scores(asked, asked)
    assert abs(honest.mean()) < 0.4
    assert 0.7 < honest.std() < 1.3
    assert scores(asked, Rule(0.6, 0.9), 20).mean() < -1.5
    assert scores(asked, Rule(1.0, 1.0), 20).mean() > 1.5

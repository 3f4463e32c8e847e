"""Objectives, dominance, and when a trial stops early."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.search.objectives import Objective, dominates, is_hopeless, pareto, parse_limit

ROW = {"ppl_delta": 2.0, "size_bytes": 4e6, "decode_tok_s": 30.0, "kl_mean": 0.5, "hidden_distance": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("kl_mean", 0.5),
        ("ppl_delta + 1e-6*size_bytes", 6.0),
        ("ppl_delta+1e+0 * kl_mean", 2.5),
        ("-1*decode_tok_s", -30.0),
        ("0.5*ppl_delta+2*kl_mean+-0.1*decode_tok_s", -1.0),
    ],
)
def test_weighted_sums(text, value):
    assert Objective.parse(text).value(ROW) == pytest.approx(value)


def test_a_column_that_is_missing_makes_no_number():
    assert math.isnan(Objective.parse("kl_mean + hidden_distance").value(ROW))
    assert math.isnan(Objective.parse("ppl").value(ROW))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kl_men", "no column is called 'kl_men'; the nearest are 'kl_mean'"),
        ("kl_mean*2", "is no objective"),
        ("", "is no objective"),
        ("1.2.3*ppl", "is no number"),
    ],
)
def test_what_is_no_objective(text, said):
    with pytest.raises(BitassayError, match=said):
        Objective.parse(text)


def test_limits():
    assert parse_limit("bits_per_weight=2.3") == ("bits_per_weight", 2.3)
    column, most = parse_limit("size_bytes=w2")
    assert (column, most.name) == ("size_bytes", "w2")
    for text, said in (("bits_per_weight", "is no limit"), ("size=1", "no column"), ("ppl=nan", "no number")):
        with pytest.raises(BitassayError, match=said):
            parse_limit(text)


POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20)


@given(POINTS)
def test_the_front_is_what_no_point_dominates_once_each(points):
    front = pareto(points)
    values = [points[index] for index in front]
    assert len(set(values)) == len(values)
    assert set(values) == {p for p in points if not any(dominates(other, p) for other in points)}


@pytest.mark.parametrize("text", ["hidden_distance+kl_mean", "hidden_distance + 1*kl_mean"])
def test_a_column_may_end_as_an_exponent_begins(text):
    assert Objective.parse(text).columns == ("hidden_distance", "kl_mean")
    assert Objective.parse("1e+2*kl_mean").terms == ((100.0, "kl_mean"),)


def test_dominance():
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((0, 3), (1, 2))


def test_with_one_objective_the_worse_half_stops():
    earlier = [(float(value),) for value in range(6)]
    assert not is_hopeless((2.5,), earlier[:4], 4)  # too few to tell
    assert not is_hopeless((2.0,), earlier, 6)
    assert is_hopeless((3.0,), earlier, 6)
    assert not is_hopeless((3.0,), earlier[4:], 6)  # the better ones are beyond the limits

"""Registries: own items, entry points, and what is refused."""

from importlib.metadata import EntryPoint

import pytest

from bitassay import registry
from bitassay.errors import BitassayError
from bitassay.registry import Registry


@pytest.fixture
def numbers(monkeypatch):
    points = [
        EntryPoint("two", "math:tau", "bitassay.numbers"),
        EntryPoint("one", "math:pi", "bitassay.numbers"),
        EntryPoint("broken", "no_such_module:x", "bitassay.numbers"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    return Registry("numbers", {"one": 1.0})


def test_entry_points_add_names_and_never_replace_our_own(numbers):
    assert list(numbers) == ["one", "two", "broken"]
    assert numbers["one"] == 1.0
    assert numbers["two"] == pytest.approx(6.283, abs=1e-3)


def test_unknown_and_broken_names_are_refused_by_name(numbers):
    with pytest.raises(BitassayError, match=r"no 'tow'; the nearest are 'two'"):
        numbers["tow"]
    with pytest.raises(BitassayError, match=r"entry point broken = 'no_such_module:x'"):
        numbers["broken"]
    with pytest.raises(ValueError, match="already"):
        numbers.register("one", 2.0)

"""The page of what replication repairs shows what its stored runs say."""

import pytest


def test_the_page_is_what_the_stored_runs_say(benchmark):
    script = benchmark("replication_tables")
    page = script.PAGE.read_text()
    assert script.filled(page) == page
    assert len(script.REGION.findall(page)) == len(list(script.RUNS.glob("*.json")))
    emptied = script.REGION.sub(r"\1\3", page)
    assert emptied != page
    assert script.filled(emptied) == page


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.012"), (0.9951, "1.00"), (9.96, "10.0"), (99.6, "100"), (-2.345, "-2.35")]
)
def test_three_digits(benchmark, value, text):
    assert benchmark("replication_tables").short(value) == text

"""Progress without a terminal, by a clock that the test moves."""

import itertools

import pytest

from bitassay.bench.models import BATCHES, CONTEXTS, work_of
from bitassay.bench.workload import Workload
from bitassay.cli import progress as progress_module
from bitassay.cli.progress import Stage, show_progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def seconds_left(line):
    return int(line.rpartition("about ")[2].split()[0]) if "left" in line else None


def test_the_time_left_falls_while_a_step_is_worked_at(clock, capsys):
    """As a study looks once a second whether its processes have finished something."""
    with show_progress() as progress:
        for done in (0, 1, 2):
            for _ in range(40):
                progress("proving", done, 12)
                clock[0] += 1
    left = [seconds_left(line) for line in capsys.readouterr().err.splitlines()]
    assert left[0] is None
    shown = [seconds for seconds in left if seconds is not None]
    assert len(shown) > 10
    assert all(later <= sooner for sooner, later in itertools.pairwise(shown))


def test_a_step_that_takes_long_does_not_make_the_rest_longer():
    stage = Stage(0, 4, 0.0)
    stage.step(1, 10.0)
    assert stage.seconds_left(10.0) == 30
    assert stage.seconds_left(15.0) == 25
    assert stage.seconds_left(500.0) == 20  # this step may end any time; two more take 10 s each
    stage.step(2, 510.0)
    assert stage.seconds_left(510.0) == 510  # now it is known to take 255 s a step


@pytest.mark.parametrize(("done", "total"), [(0, 5), (5, 5)])
def test_nothing_is_said_of_what_cannot_be_known(done, total):
    assert Stage(done, total, 0.0).seconds_left(3.0) is None


def test_what_was_finished_before_is_no_pace():
    stage = Stage(90, 100, 0.0)
    stage.step(91, 10.0)
    assert stage.seconds_left(10.0) == 90


def test_a_stage_within_a_stage_does_not_begin_it_anew(clock, capsys):
    with show_progress() as progress:
        for trial in range(5):
            progress("trials", trial, 5)
            for step in (1, 2, 3):
                clock[0] += 4
                progress("scoring", step, 3)
        progress("trials", 5, 5)
    lines = capsys.readouterr().err.splitlines()
    trials = [line for line in lines if line.startswith("trials")]
    assert [seconds_left(line) for line in trials] == [None, 48, 36, 24, 12, None]
    assert lines.count("scoring: 3/3") == 5


def test_an_end_is_said_once(clock, capsys):
    with show_progress() as progress:
        for done in (0, 1, 2, 2, 2):
            progress("verifying", done, 2)
            clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 0/2",
        "verifying: 1/2, about 10 s left",
        "verifying: 2/2",
    ]


def test_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True, raising=False)
    with show_progress() as progress:
        progress("looking")
        for done in range(4):
            progress("reading", done, 3)
        progress("reading", 0, 3)
    assert "looking" in capsys.readouterr().err


def test_work_of_cells_grows_with_what_they_do():
    """Long prompts come last in a round of `bench`; counted by the cell, the time left would climb."""
    cells = [Workload("batch", batch, 128, 16) for batch in BATCHES]
    cells += [Workload("context", 1, length, 16) for length in CONTEXTS]
    for some in (cells[: len(BATCHES)], cells[len(BATCHES) :]):
        assert [work_of(cell) for cell in some] == sorted(work_of(cell) for cell in some)
    assert work_of(cells[-1]) > 10 * work_of(cells[0])

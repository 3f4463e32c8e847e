"""The job runner: what comes of jobs by real processes, and by actors of a Ray cluster that is none.
`test_resume.py` kills and interrupts those who use it."""

import math
import os
import signal
import subprocess
import sys

import pytest

from bitassay.errors import BitassayError, MissingError
from bitassay.record import jobs
from bitassay.record.jobs import (
    ATTEMPTS,
    COMMAND,
    PARENT,
    RayWorker,
    Worker,
    WorkerLost,
    local_workers,
    run_jobs,
)
from workers import jobs_of


@pytest.fixture(autouse=True)
def _workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def answers_of(contents, workers, folder, **options):
    kept = {}
    run_jobs(
        jobs_of(contents, folder),
        workers,
        keep=lambda job, answer: kept.setdefault(job.name, answer),
        **options,
    )
    return kept


def test_jobs_are_dealt_to_workers_and_their_gpus(tmp_path):
    ticks = []
    contents = [["square", 2], ["square", 3], ["nothing"]]
    kept = answers_of(contents, local_workers(2, tmp_path / "logs", [5, 7]), tmp_path, tick=ticks.append)
    assert sorted(kept) == ["job 0", "job 1", "job 2"]
    assert [answer[0] for _, answer in sorted(kept.items())] == ["square", "square", "nothing"]
    assert {answer[1] for answer in kept.values()} == {"5", "7"}
    assert all(math.isnan(answer[3]) for answer in kept.values())
    assert (tmp_path / "parts/3.json").read_text() == "9\n"
    assert ticks[-1] == 3


def test_a_worker_is_started_anew_for_other_work(tmp_path):
    worker = Worker(tmp_path / "log")
    try:
        for name in ("one", "two"):
            [job] = jobs_of([["nothing"]], tmp_path, name=name)
            assert worker.ask(job)[2] == name
    finally:
        worker.stop()


def test_a_job_that_killed_its_worker_is_done_again(tmp_path):
    said = []
    contents = [["die", ATTEMPTS - 1, "mark"], ["square", 1]]
    kept = answers_of(
        contents, local_workers(1, tmp_path / "logs"), tmp_path, progress=lambda what, *_: said.append(what)
    )
    assert len(kept) == 2
    assert said == ["job 0: lost its worker; it is done again"] * (ATTEMPTS - 1)


def test_a_job_that_kills_every_worker_is_given_up(tmp_path):
    contents = [["die", ATTEMPTS, "mark"], ["square", 1]]
    with pytest.raises(MissingError, match=r"job 0: its process was killed by signal 9 \(.*\n.*memory"):
        answers_of(contents, local_workers(1, tmp_path / "a"), tmp_path / "a")
    given_up = []
    kept = answers_of(
        contents,
        local_workers(1, tmp_path / "b"),
        tmp_path / "b",
        give_up=lambda job, _: given_up.append(job.name),
    )
    assert (given_up, list(kept)) == (["job 0"], ["job 1"])


def test_a_users_mistake_comes_back(tmp_path):
    with pytest.raises(MissingError, match=r"job 0: no such thing\n  try: another"):
        answers_of([["mistake"], ["square", 1]], local_workers(2, tmp_path), tmp_path)


def test_a_bug_leaves_its_last_words(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"job 0: its process ended with 1: ZeroDivisionError: a bug \(see"
    ):
        answers_of([["bug"]], local_workers(1, tmp_path), tmp_path)


def test_progress_and_death_reach_who_asks(tmp_path):
    said = []
    worker = Worker(tmp_path / "log", lambda *a: said.append(a))
    [job] = jobs_of([["die", 1, "mark"]], tmp_path)
    with pytest.raises(WorkerLost):
        worker.ask(job)
    assert said == [("dying", 1, 2)]
    assert worker.ask(job)[0] == "die"  # by a new process
    worker.stop()
    with pytest.raises(WorkerLost):
        worker.ask(job)


def test_a_stopped_worker_is_killed_whatever_it_does(tmp_path):
    worker = Worker(tmp_path / "log")
    [job] = jobs_of([["nothing"]], tmp_path)
    worker.ask(job)
    child = worker._child
    worker.stop()
    assert child.returncode == -signal.SIGKILL
    assert child.stdin.closed


def test_a_worker_ends_whose_parent_had_ended_before_it_looked():
    """Its parent, as it was told, is another process than the one that it has."""
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, env={**os.environ, PARENT: str(os.getppid())}
    ) as child:
        assert child.wait(60) == 1


class Lost(Exception):
    pass


class FakeRay:
    """As much of Ray as is used, in this process. lost: how many calls lose their actor."""

    def __init__(self, lost, cpus=2):
        self.lost, self.cpus, self.calls, self.actors, self.killed = lost, cpus, 0, [], []
        self.exceptions, self.RayActorError = self, Lost

    def remote(self, **_):
        def made(kind):
            def actor(*arguments):
                node = kind(*arguments)
                self.actors.append(node)
                work = type("Method", (), {"remote": lambda _, content: lambda: node.work(content)})()
                return type("Actor", (), {"work": work})()

            return type("Made", (), {"remote": lambda _, *arguments: actor(*arguments)})()

        return made

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def get(self, reference):
        self.calls += 1
        if self.calls <= self.lost:
            raise Lost
        return reference()

    def kill(self, actor):
        self.killed.append(actor)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_jobs_of_lost_ray_workers_are_done_by_others(lost, tmp_path):
    """Their files come back, and a new worker is made where none is left."""
    ray = FakeRay(lost)
    answers_of([["square", 1], ["square", 2]], [RayWorker(ray, {}), RayWorker(ray, {})], tmp_path)
    assert [(tmp_path / f"parts/{n}.json").read_text() for n in (1, 2)] == ["1\n", "4\n"]
    assert ray.calls == 2 + lost
    assert len(ray.actors) == max(2, lost + 1)
    assert len(ray.killed) == len(ray.actors) - lost


def test_mistakes_of_ray_workers(tmp_path, monkeypatch):
    with pytest.raises(MissingError, match="job 0: its Ray worker was lost"):
        answers_of([["nothing"]], [RayWorker(FakeRay(100), {})], tmp_path)
    with pytest.raises(BitassayError, match="job 0: no such thing"):
        answers_of([["mistake"]], [RayWorker(FakeRay(0), {})], tmp_path)
    monkeypatch.setattr(jobs, "connected", lambda _: FakeRay(0, cpus=3))
    assert [len(jobs.ray_workers("auto", count, gpu=False)) for count in (2, 5)] == [2, 3]
    with pytest.raises(MissingError, match="has no GPU"):
        jobs.ray_workers("auto", 1, gpu=True)
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"bitassay\[ray\]"):
        jobs.connected("auto")

"""The job runner: workers that hold something heavy, such as a model, and do small jobs one after the other.

A worker is a process of this computer (`Worker`) or an actor of a Ray cluster (`RayWorker`, extra `ray`). It
calls the function that its `Start` names, once, and what that returns for every job:

    def function(setup, folder, progress) -> Callable[[content], answer]

Setup, contents and answers are JSON values. Larger results are files that a job writes into `folder`, each
whole or not at all; files of a Ray worker, which has a folder of its own, are copied into the run's.

`run_jobs` gives jobs to workers. A worker that is killed loses the job that it was doing; the job is done
again, at most ATTEMPTS times. A user's mistake (BitassayError) is raised as if it had happened here; any
other error of a worker ends the run and names the worker's log. Workers end with the process that started
them, and leave interrupts to it.

A process reads lines of JSON, first the function, setup and folder, then jobs. It answers each job by
{"answer": ...} or {"error": [problem, remedy, exit status]}, and may write {"progress": [what, done, total]}
before. What libraries print goes to the log.
"""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bitassay.errors import BitassayError, MissingError
from bitassay.record.files import write_bytes
from bitassay.record.progress import Progress, silent

ATTEMPTS = 3
COMMAND = (sys.executable, "-m", "bitassay.record.jobs")
PARENT = "BITASSAY_PARENT"
POLL_SECONDS = 1.0
MEMORY = "most likely memory: smaller batches or contexts, or fewer --jobs; the same command goes on"


@dataclass(frozen=True)
class Start:
    """What a worker does before its first job: call `function` ("module:name"). variables: further ones of
    the environment of a process."""

    function: str
    setup: Any
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """name: in messages; different for each job of a run."""

    name: str
    start: Start
    content: Any = None


class WorkerLost(MissingError):
    """A worker was killed while it did a job."""


@runtime_checkable
class AnyWorker(Protocol):
    """restarts: whether a worker that was lost can take another job."""

    restarts: bool

    def ask(self, job: Job) -> Any: ...

    def stop(self) -> None: ...


def run_jobs(
    jobs: Iterable[Job],
    workers: Sequence[AnyWorker],
    *,
    keep: Callable[[Job, Any], None] = lambda job, answer: None,
    give_up: Callable[[Job, WorkerLost], None] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    progress: Progress = silent,
) -> None:
    """Do all jobs, then stop the workers. A job is taken from `jobs` when a worker is free for it.

    keep: is called with each job and its answer, in this thread. tick: with the number of finished jobs, once
    a second or more often. give_up: with a job that lost ATTEMPTS workers, which is otherwise raised.
    """
    source, again, losses = iter(jobs), deque[Job](), Counter[str]()
    idle, running, done = deque(workers), dict[Future[Any], tuple[AnyWorker, Job]](), 0
    with ThreadPoolExecutor(max(1, len(workers))) as executor:
        try:
            while True:
                while idle and (job := again.popleft() if again else next(source, None)) is not None:
                    worker = idle.popleft()
                    running[executor.submit(worker.ask, job)] = worker, job
                if not running:
                    return
                finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    worker, job = running.pop(future)
                    try:
                        keep(job, future.result())
                        done += 1
                    except WorkerLost as error:
                        losses[job.name] += 1
                        if losses[job.name] < ATTEMPTS:
                            progress(f"{job.name}: lost its worker; it is done again")
                            again.append(job)
                        elif give_up is None:
                            raise
                        else:
                            give_up(job, error)
                        if not (worker.restarts or (not idle and not running)):
                            continue
                    idle.append(worker)
                tick(done)
        finally:
            for worker in workers:
                worker.stop()


class Worker:
    """A process of this computer. It is started for the first job, and anew for one with another Start.
    gpu: the only one that it sees."""

    restarts = True

    def __init__(self, log: Path, progress: Progress = silent, gpu: int | None = None):
        self.log, self.progress = log, progress
        self._variables = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        self._child: subprocess.Popen[str] | None = None
        self._start: Start | None = None
        self._stopped, self._lock = False, threading.Lock()

    def ask(self, job: Job) -> Any:
        """Return the answer to a job. Raises the worker's BitassayError, WorkerLost where the process was
        killed, RuntimeError where it failed by a bug."""
        child = self._child_of(job)
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(OSError):  # it is dead; the missing answer says so
            child.stdin.write(json.dumps(job.content) + "\n")
            child.stdin.flush()
        for line in child.stdout:
            if not line.endswith("\n"):
                break  # killed while it wrote
            message = json.loads(line)
            if "progress" not in message:
                return _answer(job, message)
            self.progress(*message["progress"])
        status = child.wait()
        if status < 0:
            raise WorkerLost(
                f"{job.name}: its process was killed by signal {-status} (see {self.log})", MEMORY
            )
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{job.name}: its process ended with {status}: {last} (see {self.log})")

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        with self._lock:
            self._stopped = True
            self._end()

    def _end(self) -> None:
        if (child := self._child) is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with suppress(OSError, ValueError):  # the other end is gone, or a thread reads it
                stream.close()

    def _child_of(self, job: Job) -> "subprocess.Popen[str]":
        with self._lock:
            if self._stopped:
                raise WorkerLost(f"{job.name}: stopped")
            if self._child is None or self._child.poll() is not None or job.start != self._start:
                self._end()
                self._child, self._start = self._started(job.start), job.start
            return self._child

    def _started(self, start: Start) -> "subprocess.Popen[str]":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    "OMP_WAIT_POLICY": "PASSIVE",  # spinning, two busy processes slow each other many times
                    **os.environ,
                    **start.variables,
                    **self._variables,
                    PARENT: str(os.getpid()),
                },
            )
        assert child.stdin is not None
        with suppress(OSError):
            child.stdin.write(json.dumps([start.function, start.setup, str(start.folder)]) + "\n")
        return child


def local_workers(count: int, logs: Path, gpus: Sequence[int] = ()) -> Sequence[AnyWorker]:
    """Return `count` workers of this computer with logs in a folder, which take turns in using the GPUs."""
    return [
        Worker(logs / f"{number:02d}.log", gpu=gpus[number % len(gpus)] if gpus else None)
        for number in range(count)
    ]


def ask_once(job: Job) -> Any:
    """Return the answer to a job by a process of its own, which ends then. Raises as Worker.ask does."""
    worker = Worker(job.start.folder / "worker.log")
    try:
        return worker.ask(job)
    finally:
        worker.stop()


class _Reply:
    """A worker's side: the function of its jobs, made with the first one."""

    def __init__(self, function: str, setup: Any, folder: Path, progress: Progress):
        self._arguments, self._function = (setup, folder, progress), function
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, content: Any) -> dict[str, Any]:
        try:
            if (work := self._work) is None:
                module, _, name = self._function.partition(":")
                work = self._work = getattr(importlib.import_module(module), name)(*self._arguments)
            return {"answer": work(content)}
        except BitassayError as error:
            return {"error": [error.problem, error.remedy, error.exit_status]}


def _answer(job: Job, message: Mapping[str, Any]) -> Any:
    if "error" not in message:
        return message["answer"]
    problem, remedy, status = message["error"]
    kind = MissingError if status == MissingError.exit_status else BitassayError
    raise kind(f"{job.name}: {problem}", remedy)


class RayWorker:
    """An actor of a Ray cluster, made for the first job. Another one may find no room where it was lost."""

    restarts = False

    def __init__(self, ray: Any, resources: Mapping[str, int]):
        self._ray, self._actor = ray, None
        self._remote = ray.remote(max_restarts=0, **resources)(Node)

    def ask(self, job: Job) -> Any:
        """Return the answer to a job, whose files are then in its folder. Raises as Worker.ask does."""
        if self._actor is None:
            self._actor = self._remote.remote(job.start.function, job.start.setup)
        try:
            message, files = self._ray.get(self._actor.work.remote(job.content))
        except self._ray.exceptions.RayActorError as error:
            self._actor = None
            raise WorkerLost(f"{job.name}: its Ray worker was lost ({error})", MEMORY) from error
        for name, content in files.items():
            path = (job.start.folder / name).resolve()
            assert path.is_relative_to(job.start.folder.resolve())
            write_bytes(path, content)
        return _answer(job, message)

    def stop(self) -> None:
        """Kill the actor."""
        if self._actor is not None:
            self._ray.kill(self._actor)


class Node:
    """What runs on a node of a Ray cluster: jobs in a folder of its own."""

    def __init__(self, function: str, setup: Any):
        self._folder = tempfile.TemporaryDirectory()
        self._reply = _Reply(function, setup, Path(self._folder.name) / "run", silent)

    def work(self, content: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the reply to a job and the files that it made in folders of its folder, as bytes by path.
        They are removed here."""
        message, folder = self._reply(content), Path(self._folder.name) / "run"
        paths = [path for path in folder.rglob("*/*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        for path in paths:
            path.unlink()
        return message, files


def ray_workers(address: str, jobs: int, *, gpu: bool) -> Sequence[AnyWorker]:
    """Return workers on the cluster at `address` ("auto": the one of this computer), one a CPU or GPU, at
    most one a job. Raises MissingError without Ray, a cluster, or room."""
    ray, kind = connected(address), "GPU" if gpu else "CPU"
    room = int(ray.cluster_resources().get(kind, 0))
    if room < 1:
        raise MissingError(f"the Ray cluster at {address} has no {kind}", "add a node")
    return [RayWorker(ray, {"num_cpus": 1, "num_gpus": int(gpu)}) for _ in range(min(room, jobs))]


def connected(address: str) -> Any:
    """Return the `ray` module, connected to a cluster."""
    if find_spec("ray") is None:
        raise MissingError("--ray needs Ray, which is not installed", "pip install 'bitassay[ray]'")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise MissingError(
                f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]})",
                "start one with `ray start --head`, or leave --ray out",
            ) from error
    return ray


def end_with_parent() -> None:
    """End this process, whatever it is doing, soon after the one that started it has ended."""
    parent = int(os.environ.pop(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Do the jobs on stdin until there are no more."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    def progress(what: str, done: int = 0, total: int = 0) -> None:
        say({"progress": [what, done, total]})

    function, setup, folder = json.loads(sys.stdin.readline())
    reply = _Reply(function, setup, Path(folder), progress)
    for line in sys.stdin:
        say(reply(json.loads(line)))


if __name__ == "__main__":
    main()

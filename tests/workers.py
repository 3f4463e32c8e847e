"""Workers for tests: those that are none and do jobs in this process, which saves importing everything anew,
and processes that do what they are told."""

import importlib
import json
import math
import os
import signal
import threading
import time

from bitassay.errors import MissingError
from bitassay.record.files import write_json
from bitassay.record.jobs import Job, Start, local_workers, ray_workers, run_jobs
from bitassay.record.progress import silent

LOCK = threading.RLock()  # the pool asks from threads


class InProcess:
    """As much of `record.jobs.Worker` as is used. `started` has the function and name of each job."""

    started: list[str]
    restarts = True

    def __init__(self, log, progress=silent, gpu=None):
        self.progress, self.start, self.work = progress, None, None

    def ask(self, job):
        with LOCK:
            module, _, name = job.start.function.partition(":")
            self.started.append(f"{name}: {job.name}")
            if job.start != self.start:
                setup = json.loads(json.dumps(job.start.setup))
                self.work = getattr(importlib.import_module(module), name)(
                    setup, job.start.folder, self.progress
                )
                self.start = job.start
            return json.loads(json.dumps(self.work(json.loads(json.dumps(job.content)))))

    def stop(self):
        pass


def in_process(patch):
    """Let workers of this computer be these; return what they start."""
    patch.setattr("bitassay.record.jobs.Worker", InProcess)
    patch.setattr("bitassay.bench.worker.Worker", InProcess)
    patch.setattr(InProcess, "started", [], raising=False)
    return InProcess.started


def says_its_instructions(setup, folder, progress):
    return lambda content: " ".join([os.environ["ATEN_CPU_CAPABILITY"], *setup])


def dies(setup, folder, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def scripted(setup, folder, progress):
    """A worker that does what it is told: to write a square as a file, pause, fail, or die while marker files
    are fewer than so many."""

    def work(content):
        what, *rest = content
        if what == "square":
            [number] = rest
            time.sleep(setup["pause"])
            write_json(folder / "parts" / f"{number}.json", number**2)
        elif what == "die":
            times, name = rest
            marks = list(folder.glob(f"{name}-*"))
            if len(marks) < times:
                (folder / f"{name}-{len(marks)}").touch()
                progress("dying", 1, 2)
                os.kill(os.getpid(), signal.SIGKILL)
        elif what == "mistake":
            raise MissingError("no such thing", "another")
        elif what == "bug":
            raise ZeroDivisionError("a bug")
        return [what, os.environ.get("CUDA_VISIBLE_DEVICES"), setup["name"], math.nan]

    return work


def jobs_of(contents, folder, pause=0.0, name="one"):
    start = Start("workers:scripted", {"pause": pause, "name": name}, folder)
    return [Job(f"job {place}", start, content) for place, content in enumerate(contents)]


def squares(folder, ray=None):
    """Six files by two workers, each in its own time; those that exist are not made again."""
    todo = [n for n in range(6) if not (folder / "parts" / f"{n}.json").exists()]
    workers = ray_workers(ray, 2, gpu=False) if ray else local_workers(2, folder / "logs")
    run_jobs(jobs_of([["square", n] for n in todo], folder, 0.2), workers)

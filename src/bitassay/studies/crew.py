"""Cells done by local processes: `python -m bitassay.studies.crew FOLDER THREADS` is one of them.

A process holds the model and takes cells as lines on stdin, `KIND WHICH`; it writes their files into the run
folder and answers each with a line of JSON: {} or {"error": [problem, remedy, exit status]}. One that dies
loses the cell that it was at, which another process then does; a cell that kills two is given up.
"""

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bitassay.errors import BitassayError, MissingError
from bitassay.models.config import read_config, text_config
from bitassay.models.identity import Identity
from bitassay.models.options import as_dtype
from bitassay.models.positions import check_folder
from bitassay.models.source import resolve
from bitassay.models.weights import stored_bytes
from bitassay.record.files import read_json
from bitassay.record.processes import end, end_with_parent, helper_variables
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder, open_run_folder
from bitassay.studies.cells import Bench, Cell, cells_of, is_done
from bitassay.studies.variants import VariantPlan

COMMAND = (sys.executable, "-m", "bitassay.studies.crew")
ATTEMPTS = 2


def run_local(
    folder: RunFolder, cells: Sequence[Cell], jobs: int, threads: int, progress: Progress = silent
) -> None:
    """Do all cells, `jobs` at a time with so many `threads` each; returns when all are done.

    Raises BitassayError for what a process says is the user's mistake, MissingError where one cell killed
    several.
    """
    todo: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        todo.put(cell)
    members = [_Member(folder, place, threads) for place in range(min(jobs, len(cells)))]
    done: list[Cell] = []
    with ThreadPoolExecutor(max(1, len(members))) as pool:
        try:
            running = {pool.submit(member.work_off, todo, done) for member in members}
            while running:
                finished, running = wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                progress("cells", len(done), len(cells))
                for future in finished:
                    future.result()
        finally:
            for member in members:
                member.stop()


def do_study(
    plan: VariantPlan,
    kind: str,
    about: str,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> tuple[RunFolder, dict[str, Any]]:
    """Do what is not done yet of all cells of a plan: its run folder, and how its run.json begins. jobs:
    processes at a time (default: one a core, as many as memory holds). ray: "auto" or the address of a Ray
    cluster, which then does the cells. Raises BitassayError for bad input, MissingError for what the
    environment lacks."""
    source = resolve(plan.model, progress)
    if plan.protocol is not None:
        check_folder(source.folder, plan.protocol, trust_remote_code=plan.trust_remote_code)
    digest = Identity(source).weights_digest
    name = f"{plan.study}-{Path(source.name).name}"
    folder = open_run_folder(name, plan.described(kind, digest), out)
    progress(f"run {folder.run_id} in {folder.path}")
    _do_cells(folder, plan, source.folder, jobs, ray, progress)
    return folder, {
        "study": plan.study,
        "about": about,
        "model": {"name": source.name, "origin": source.origin, "weights_digest": digest},
        "settings": plan.settings,
    }


def _do_cells(
    folder: RunFolder, plan: VariantPlan, model: Path, jobs: int | None, ray: str | None, progress: Progress
) -> None:
    """model: the folder of its weights."""
    todo = [cell for cell in cells_of(plan) if not is_done(folder, plan, cell)]
    if todo and ray is not None:
        from bitassay.studies.cluster import run_on_ray

        run_on_ray(folder, todo, ray, progress)
    elif todo:
        count, threads = crew_size(plan, model, len(todo), jobs)
        run_local(folder, todo, count, threads, progress)


def crew_size(plan: VariantPlan, model: Path, cells: int, jobs: int | None) -> tuple[int, int]:
    """Processes at a time, no more than cells, and threads of each. By default one process a core (one in all
    on a GPU), as many as have room for two models and the logits of a block."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        weights = stored_bytes(model)
        room = psutil.virtual_memory().available // max(1, 2 * weights + _logit_bytes(plan, model))
        jobs = 1 if plan.device != "cpu" else max(1, min(cores, int(room)))
    jobs = min(jobs, cells)
    return jobs, max(1, cores // jobs)


def _logit_bytes(plan: VariantPlan, model: Path) -> int:
    """Of the base model's for a block of windows, and of one window more for the variant beside it, which is
    also scored in fp32."""
    if plan.protocol is None:
        return 0
    config = text_config(read_config(model, trust_remote_code=plan.trust_remote_code))
    row = config.vocab_size * as_dtype(plan.dtype).itemsize
    return (plan.block + 2) * plan.protocol.window_tokens * row


class _Member:
    """One process, and another one where that dies."""

    def __init__(self, folder: RunFolder, place: int, threads: int):
        self.folder, self.threads = folder, threads
        self.log = folder.path / "workers" / f"{place:02d}.log"
        self.child: subprocess.Popen[str] | None = None
        self.stopped = False

    def work_off(self, todo: "queue.SimpleQueue[Cell]", done: list[Cell]) -> None:
        with suppress(queue.Empty):
            while not self.stopped:
                cell = todo.get_nowait()
                self._work(cell)
                done.append(cell)

    def _work(self, cell: Cell) -> None:
        for _ in range(ATTEMPTS):
            answer = self._ask(cell)
            if self.stopped:
                return
            if answer is not None and "error" in answer:
                problem, remedy, status = answer["error"]
                raise (MissingError if status == MissingError.exit_status else BitassayError)(problem, remedy)
            if answer is not None:
                return
        raise MissingError(
            f"{cell.name}: its process died {ATTEMPTS} times (see {self.log})",
            "most likely memory: fewer --jobs; the same command goes on where it stopped",
        )

    def _ask(self, cell: Cell) -> dict[str, list[Any]] | None:
        """The answer; None where the process died."""
        if self.child is None or self.child.poll() is not None:
            self.child = self._start()
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with suppress(OSError):  # it died; the missing answer says so
            self.child.stdin.write(f"{cell.kind} {cell.which}\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            self.child.wait()
            return None
        return json.loads(line)

    def _start(self) -> "subprocess.Popen[str]":
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*COMMAND, str(self.folder.path), str(self.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **os.environ,
                    "OMP_NUM_THREADS": str(self.threads),
                    **helper_variables(),
                },
            )

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.stopped = True
        if self.child is not None:
            end(self.child)


def main(path: str, threads: str) -> int:
    """Do cells until there are no more; an interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    folder = RunFolder(Path(path), read_json(Path(path) / "plan.json"))
    bench: Bench | None = None
    for line in sys.stdin:
        kind, which = line.split()
        said: dict[str, list[object]] = {}
        try:
            bench = bench or Bench(folder.plan, int(threads))
            bench.work(Cell(kind, int(which)), folder)
        except BitassayError as error:
            said = {"error": [error.problem, error.remedy, error.exit_status]}
        answers.write(json.dumps(said) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(*sys.argv[1:]))

"""Cells done by a Ray cluster (the extra `ray`): the same cells and the same files as `crew.py` makes.

An actor on a node holds the model, as a local process does, and works in a folder of its own; what it made
goes back as bytes, and this process writes it into the run folder. So the nodes share no disk, only the
package and a way to the model. An actor that is lost, with its node or alone, loses the cell that it was at:
the others do it, and a new one where none is left. Each cell is tried ATTEMPTS times.
"""

import logging
import tempfile
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitassay.errors import BitassayError, MissingError
from bitassay.record.files import atomic_file
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.studies.cells import Bench, Cell

ATTEMPTS = 3
WAIT_SECONDS = 1.0


class Worker:
    """What runs on a node: a cell's files as bytes by name, or the error that a user can act on."""

    def __init__(self, described: dict[str, Any]):
        self.described, self.bench = described, None

    def work(self, kind: str, which: int) -> dict[str, bytes] | tuple[str, str, int]:
        try:
            if self.bench is None:
                self.bench = Bench(self.described, threads=1)
            with tempfile.TemporaryDirectory() as place:
                folder = RunFolder(Path(place) / "run", self.described)
                self.bench.work(Cell(kind, which), folder)
                return {path.name: path.read_bytes() for path in (folder.path / "parts").iterdir()}
        except BitassayError as error:
            return error.problem, error.remedy, error.exit_status


def run_on_ray(folder: RunFolder, cells: Sequence[Cell], address: str, progress: Progress = silent) -> None:
    """Do all cells on the cluster at `address` ("auto": the one that this computer belongs to), one a CPU,
    or one a GPU where the study runs on GPUs.

    Raises MissingError without Ray or a cluster, or where one cell lost several actors; BitassayError for
    what a worker says is the user's mistake.
    """
    ray = connected(address)
    on_gpu = folder.plan["plan"]["device"] != "cpu"
    remote = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_restarts=0)(Worker)
    room = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
    if room < 1:
        raise MissingError(f"the Ray cluster at {address} has no {'GPU' if on_gpu else 'CPU'}", "add a node")
    todo, tries = deque(cells), dict.fromkeys(cells, 0)
    idle: list[Any] = [remote.remote(folder.plan) for _ in range(min(room, len(cells)))]
    running: dict[Any, tuple[Any, Cell]] = {}
    done = 0
    try:
        while todo or running:
            while todo and idle:
                actor, cell = idle.pop(), todo.popleft()
                tries[cell] += 1
                running[actor.work.remote(cell.kind, cell.which)] = (actor, cell)
            finished, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
            for reference in finished:
                actor, cell = running.pop(reference)
                try:
                    made = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    progress(f"{cell.name}: lost a worker; it is done again")
                    if tries[cell] == ATTEMPTS:
                        raise MissingError(
                            f"{cell.name}: lost {ATTEMPTS} workers ({error})",
                            "most likely memory; the same command goes on where it stopped",
                        ) from error
                    todo.append(cell)
                    # A new actor might wait for the place of one that waits for work.
                    if not idle and not running:
                        idle.append(remote.remote(folder.plan))
                    continue
                _keep(folder, made)
                idle.append(actor)
                done += 1
            progress("cells", done, len(cells))
    finally:
        for actor in (*idle, *(actor for actor, _ in running.values())):
            ray.kill(actor)


def _keep(folder: RunFolder, made: dict[str, bytes] | tuple[str, str, int]) -> None:
    """Write what a worker sent into the run folder; raise the error that it sent instead."""
    if isinstance(made, tuple):
        problem, remedy, status = made
        raise (MissingError if status == MissingError.exit_status else BitassayError)(problem, remedy)
    for name, content in made.items():
        with atomic_file(folder.path / "parts" / Path(name).name) as temporary:
            temporary.write_bytes(content)


def connected(address: str) -> Any:
    """The `ray` module, connected; a connection that there is already is used."""
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

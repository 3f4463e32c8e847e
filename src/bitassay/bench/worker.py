"""A process that holds one model and times it when it is asked to: so that what a model takes of memory is
its own, and several models can take turns.

Lines of JSON both ways. It is started with a file that says which model; it answers `facts` of it once that
is loaded, and then every request on stdin with one line on stdout:

    {"measure": {kind, batch, prompt_tokens, new_tokens}}     -> {"answer": ...}
    {"limits": true}                                           -> {"answer": ...}

Before an answer may come lines `{"progress": [what, done, total]}`; instead of one, `{"error": [problem,
remedy, exit status]}`. Nothing else is ever written to stdout: what libraries print goes to stderr.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bitassay.bench.workload import ModelTimer, Workload
from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.models.options import AUTO
from bitassay.models.source import resolve
from bitassay.quantization.export.card import read_card
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.files import read_json, write_json
from bitassay.record.processes import end, end_with_parent, helper_variables
from bitassay.record.progress import Progress, silent


@dataclass(frozen=True)
class Job:
    """Which model a worker holds: `recipe` applied to `model`, packed; or `model` itself, with its codes
    where it is a quantized folder. threads: None leaves torch's own choice."""

    model: str
    recipe: Recipe | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    trust_remote_code: bool = False
    attention: str = AUTO


COMMAND = (sys.executable, "-m", "bitassay.bench.worker")
_JOB = TypeAdapter(Job)
_WORKLOAD = TypeAdapter(Workload)


def model_timer(job: Job, progress: Progress = silent) -> ModelTimer:
    """The job's model in this process."""
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    source = resolve(job.model, progress)
    model = load(
        job.model,
        dtype=job.dtype,
        device=job.device,
        packed=job.recipe is None and read_card(source.folder) is not None,
        trust_remote_code=job.trust_remote_code,
        attention=job.attention,
        progress=progress,
    )
    if job.recipe is not None:
        model = quantize_cached(model, job.recipe, packed=True, progress=progress)
    return ModelTimer(model)


class Worker:
    """A runner in a process of its own. Raises BitassayError for what the process says is the user's mistake,
    MissingError where it was killed."""

    def __init__(self, name: str, job: Job, folder: Path, progress: Progress = silent):
        self.name, self._progress = name, progress
        path, self._log = folder / f"{name}.json", folder / f"{name}.log"
        write_json(path, _JOB.dump_python(job, mode="json"))
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*COMMAND, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **helper_variables()},
            )
        self._facts = self._answer()

    def facts(self) -> dict[str, Any]:
        return self._facts

    def limits(self) -> dict[str, Any]:
        return self._ask({"limits": True})

    def measure(self, workload: Workload) -> dict[str, Any]:
        return self._ask({"measure": asdict(workload)})

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        end(self._child)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        with suppress(OSError):  # it died; why, the missing answer says
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            said = json.loads(line)
            if "progress" in said:
                what, done, total = said["progress"]
                self._progress(f"{self.name}: {what}", done, total)
            elif "error" in said:
                problem, remedy, status = said["error"]
                kind = MissingError if status == MissingError.exit_status else BitassayError
                raise kind(f"{self.name}: {problem}", remedy)
            else:
                return said["answer"]
        status = self._child.wait()
        if status == -signal.SIGKILL:
            raise MissingError(
                f"{self.name}: its process was killed, most likely for want of memory",
                "smaller --batches or --contexts; the same command goes on where it stopped",
            )
        tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{self.name}: its process ended with {status}: {''.join(tail)} (see {self._log})")


def serve(job: Job, requests: Iterable[str], answers: TextIOBase) -> int:
    """Load the job's model and answer until there are no more requests."""

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value, allow_nan=False) + "\n")
        answers.flush()

    def tell(what: str, done: int = 0, total: int = 0) -> None:
        say({"progress": [what, done, total]})

    try:
        runner = model_timer(job, tell)
        say({"answer": runner.facts()})
        for line in requests:
            request = json.loads(line)
            if "measure" in request:
                say({"answer": runner.measure(_WORKLOAD.validate_python(request["measure"]))})
            else:
                say({"answer": runner.limits()})
    except BitassayError as error:
        say({"error": [error.problem, error.remedy, error.exit_status]})
        return error.exit_status
    return 0


def main(path: str) -> int:
    """Serve on stdin and stdout; an interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(_JOB.validate_python(read_json(Path(path))), sys.stdin, answers)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1]))

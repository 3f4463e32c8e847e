"""Time one model in a process of its own (`record/jobs.py`).
So what it takes of memory is its own, and several models can take turns."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bitassay.bench.engine_timer import EngineTimer
from bitassay.bench.workload import ModelTimer, Workload
from bitassay.engines.arithmetic import Arithmetic
from bitassay.engines.engine import TRANSFORMERS
from bitassay.engines.load import load
from bitassay.models.source import resolve
from bitassay.quantization.export.card import read_card
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.jobs import Job, Start, Worker
from bitassay.record.progress import Progress, prefixed, silent


@dataclass(frozen=True)
class TimedModel(Arithmetic):
    """`recipe` applied to `model`, packed; or `model` itself, with its codes where it is a quantized folder,
    in `engine`. threads: None leaves torch's own choice."""

    model: str
    recipe: Recipe | None = None
    dtype: str = field(default="bfloat16", kw_only=True)
    threads: int | None = None
    trust_remote_code: bool = False
    engine: str = TRANSFORMERS


_MODEL = TypeAdapter(TimedModel)


def model_timer(timed: TimedModel, progress: Progress = silent) -> ModelTimer:
    """Load the model in this process."""
    import torch

    if timed.threads is not None:
        torch.set_num_threads(timed.threads)
    loading: dict[str, Any] = {"trust_remote_code": timed.trust_remote_code, "progress": progress}
    if timed.engine != TRANSFORMERS:
        return EngineTimer(load(timed.model, engine=timed.engine, **loading))
    is_packed = timed.recipe is None and read_card(resolve(timed.model, progress).folder) is not None
    model = timed.loaded(timed.model, packed=is_packed, **loading)
    if timed.recipe is not None:
        model = quantize_cached(model, timed.recipe, packed=True, progress=progress)
    return ModelTimer(model)


def start(setup: Any, folder: Path, progress: Progress) -> Callable[[Any], dict[str, Any]]:
    """Load the model of `setup`. A job is the name of a method of ModelTimer, and the workload for
    `measure`."""
    timer = model_timer(_MODEL.validate_python(setup), progress)

    def work(content: Any) -> dict[str, Any]:
        method, workload = content
        return getattr(timer, method)(*[] if workload is None else [Workload(**workload)])

    return work


class ProcessTimer:
    """A timer (`workload.py`) in a process of its own. Its errors name the model."""

    def __init__(self, name: str, timed: TimedModel, log: Path, progress: Progress = silent):
        setup = _MODEL.dump_python(timed, mode="json")
        self._name, self._start = name, Start("bitassay.bench.worker:start", setup, log.parent)
        self._worker = Worker(log, prefixed(name, progress))

    def facts(self) -> dict[str, Any]:
        return self._ask("facts")

    def limits(self) -> dict[str, Any]:
        return self._ask("limits")

    def measure(self, workload: Workload) -> dict[str, Any]:
        return self._ask("measure", asdict(workload))

    def stop(self) -> None:
        self._worker.stop()

    def _ask(self, method: str, workload: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._worker.ask(Job(self._name, self._start, [method, workload]))

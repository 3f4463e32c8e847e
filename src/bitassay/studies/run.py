"""Run a study of variants: its cells (`cells.py`), done by workers here or on a Ray cluster."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from bitassay.bench.models import bench
from bitassay.models.config import read_config, text_config
from bitassay.models.identity import Identity
from bitassay.models.options import as_dtype
from bitassay.models.positions import check_folder
from bitassay.models.source import resolve
from bitassay.models.weights import stored_bytes
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.jobs import Job, Start, local_workers, ray_workers, run_jobs
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder, open_run_folder
from bitassay.studies.cells import Cell, cells_of, is_done
from bitassay.studies.variants import VariantPlan


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
    folder = open_run_folder(name, plan.described(kind, digest), out, progress)
    todo = [cell for cell in cells_of(plan) if not is_done(folder, plan, cell)]
    if todo:
        _do_cells(folder, plan, todo, source.folder, jobs, ray, progress)
    return folder, {
        "study": plan.study,
        "about": about,
        "model": {"name": source.name, "origin": source.origin, "weights_digest": digest},
        "settings": plan.settings,
    }


def _do_cells(
    folder: RunFolder,
    plan: VariantPlan,
    cells: list[Cell],
    model: Path,
    jobs: int | None,
    ray: str | None,
    progress: Progress,
) -> None:
    """Do these cells. model: the folder of its weights."""
    variables, gpus = {}, range(torch.cuda.device_count() if plan.device == "cuda" else 0)
    if ray is not None:
        workers = ray_workers(ray, len(cells), gpu=plan.device != "cpu")
    else:
        count, threads = workers_and_threads(plan, model, len(cells), jobs, len(gpus))
        variables["OMP_NUM_THREADS"] = str(threads)
        workers = local_workers(count, folder.path / "workers", gpus)
    start = Start("bitassay.studies.cells:start", folder.plan, folder.path, variables)
    run_jobs(
        (Job(cell.name, start, [cell.kind, cell.which]) for cell in cells),
        workers,
        tick=lambda done: progress("cells", done, len(cells)),
        progress=progress,
    )


def time_variants(
    plan: VariantPlan, recipes: Sequence[Recipe], out: Path, progress: Progress, **cells: Any
) -> dict[str, Any]:
    """Return a `bench` of the base model and these recipes, which take turns. cells: what is timed."""
    run, _ = bench(
        plan.model,
        recipes,
        controls=False,
        out=out,
        dtype=plan.dtype,
        device=plan.device,
        progress=progress,
        trust_remote_code=plan.trust_remote_code,
        attention=plan.attention,
        **cells,
    )
    return run


def workers_and_threads(
    plan: VariantPlan, model: Path, cells: int, jobs: int | None, gpus: int = 0
) -> tuple[int, int]:
    """Return how many processes work at a time, at most one a cell, and the threads of each. By default there
    is one a GPU, or one a core as far as there is memory for two models and the logits of a block."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None and plan.device != "cpu":
        jobs = max(1, gpus)
    elif jobs is None:
        bytes_each = 2 * stored_bytes(model) + _logit_bytes(plan, model)
        jobs = max(1, min(cores, psutil.virtual_memory().available // max(1, bytes_each)))
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

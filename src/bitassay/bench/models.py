"""Time models beside each other and beside what the machine could do: `bench`.

Every model is packed, as it would be run, in a process of its own. A round measures the machine's limits,
then every workload (`workload.py`) by every model in turn, in another order each round; figures are medians
over rounds, comparisons with the base model ratios within rounds (`rounds.py`). The share of the bound
that was reached (`roofline.py`) is within rounds too.

Each workload of each round is a part of the run folder: the same command goes on where it was stopped.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitassay.bench.roofline import Cost
from bitassay.bench.rounds import INTERVAL, ratio_of, spread, turns
from bitassay.bench.worker import ProcessTimer, TimedModel
from bitassay.bench.workload import Timer, Workload
from bitassay.errors import BitassayError, at_least
from bitassay.models.config import layer_count
from bitassay.models.identity import Identity
from bitassay.models.options import AUTO, as_device, as_dtype
from bitassay.models.source import resolve
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe, row_names
from bitassay.quantization.replication.controls import Place, with_controls
from bitassay.record.files import check_folder, write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder, default_folder
from bitassay.record.versions import versions

SCHEMA = 1
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class BenchPlan:
    """What is timed: prompts of `prompt_tokens` in each of `batches`, and one prompt of each length of
    `contexts`; `repeats` rounds of all."""

    model: str
    recipes: tuple[Recipe, ...] = ()
    candidates: tuple[str, ...] = ()
    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 5
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    attention: str = AUTO

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        row_names(self.recipes, self.candidates)
        as_device(self.device)
        at_least(
            1,
            batches=min(self.batches, default=None),
            contexts=min(self.contexts, default=None),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            threads=self.threads,
        )
        if not self.workloads:
            raise BitassayError("there is nothing to time", "--batches 1, or --contexts 512")

    @property
    def workloads(self) -> list[Workload]:
        short = [Workload("batch", batch, self.prompt_tokens, self.new_tokens) for batch in self.batches]
        return short + [Workload("context", 1, length, self.new_tokens) for length in self.contexts]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"recipes": [recipe.model_dump(mode="json") for recipe in self.recipes]}


def bench(
    model: str,
    recipes: Sequence[str | Path | Recipe] = (),
    *,
    controls: bool = True,
    out: Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Time MODEL, what `recipes` make of it, and other models; `options` are fields of BenchPlan. Returns the
    run (the content of run.json) and its folder. controls: add those of recipes with copies, and `pairs` of
    each with them.

    Raises BitassayError for bad input.
    """
    plan = BenchPlan(model, tuple(find_recipe(recipe) for recipe in recipes), **options)
    if out is not None:
        check_folder(out)
    for name in plan.candidates:
        check_fit(name, trust_remote_code=trust_remote_code, progress=progress)
    check_fit(model, plan.recipes, trust_remote_code=trust_remote_code, progress=progress)
    sources = {name: resolve(name, progress) for name in (model, *plan.candidates)}
    places = list[Place]()
    if controls and any(recipe.replication is not None for recipe in plan.recipes):
        layers = layer_count(sources[model].folder, trust_remote_code=trust_remote_code)
        with_them, places = with_controls(plan.recipes, layers)
        plan = replace(plan, recipes=with_them)
    digests = {name: Identity(source).weights_digest for name, source in sources.items()}
    folder = _open_folder(plan, sources[model].name, digests, out)
    progress(f"run {folder.run_id} in {folder.path}")
    common = {
        "dtype": plan.dtype,
        "device": plan.device,
        "threads": plan.threads,
        "trust_remote_code": trust_remote_code,
        "attention": plan.attention,
    }
    timed = {BASE: TimedModel(model, **common)}
    timed |= {recipe.name: TimedModel(model, recipe, **common) for recipe in plan.recipes}
    timed |= {name: TimedModel(name, **common) for name in plan.candidates}
    logs = {name: folder.path / "workers" / f"{place:02d}.log" for place, name in enumerate(timed)}
    started: dict[str, ProcessTimer] = {}

    def runner(name: str) -> ProcessTimer:
        if name not in started:
            progress(f"{name}: starting")
            started[name] = ProcessTimer(Path(name).name, timed[name], logs[name], progress)
        return started[name]

    try:
        facts, rounds = measure_rounds(list(timed), runner, plan.workloads, plan.repeats, folder, progress)
    finally:
        for each in started.values():
            each.stop()
    run = {
        "schema": SCHEMA,
        "kind": "bench",
        "run_id": folder.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": sources[model].name,
            "origin": sources[model].origin,
            "weights_digest": digests[model],
        },
        "settings": plan.to_dict(),
        "interval": INTERVAL,
        **summarise(facts, rounds, plan.workloads),
        "pairs": pairs_of(places, rounds, plan.workloads),
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def measure_rounds(
    names: Sequence[str],
    runner: Callable[[str], Timer],
    workloads: Sequence[Workload],
    repeats: int,
    folder: RunFolder,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts by model, and for each round the machine's limits and, by workload, the load (runnable processes,
    over a minute) and the answer of every model. What the folder has is not measured again."""
    facts = {
        name: folder.part(f"facts-{place:02d}", lambda name=name: runner(name).facts())
        for place, name in enumerate(names)
    }
    rounds, done, whole = [], 0, repeats * sum(map(work_of, workloads))
    for round_ in range(repeats):
        found: dict[str, Any] = {
            "limits": folder.part(f"round-{round_:02d}-limits", lambda: runner(names[0]).limits()),
            "cells": {},
        }
        for workload in workloads:

            def answers(workload: Workload = workload, round_: int = round_) -> dict[str, Any]:
                load = os.getloadavg()[0]
                given = {name: runner(name).measure(workload) for name in turns(names, round_)}
                return {"load": load, "answers": given}

            found["cells"][workload.name] = folder.part(f"round-{round_:02d}-{workload.name}", answers)
            done += work_of(workload)
            progress("timing, percent", 100 * done // whole, 100)
        rounds.append(found)
    return facts, rounds


def work_of(workload: Workload) -> int:
    """Return about how much work a workload is, in tokens of a prefill. A decoding step reads all weights,
    which takes about as long as some tokens of a prefill take to compute."""
    return workload.batch * workload.prompt_tokens + workload.new_tokens * (16 + workload.batch)


def summarise(
    facts: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], workloads: Sequence[Workload]
) -> dict[str, Any]:
    """The parts of run.json that are made of measurements: environment, machine, models, rows, rounds.

    The first model is the base. A row is one workload by one model: medians, spread ((largest - smallest) /
    median), ratios to the base with intervals, costs, shares of the bound, peaks of memory; or `skipped`, why
    there is none of that.
    """
    base = next(iter(facts))
    limits = [one["limits"] for one in rounds]
    peaks = limits[0]["peaks"]
    machine = {
        "bandwidth": statistics.median(one["bandwidth"] for one in limits),
        "peaks": {name: statistics.median(one["peaks"][name] for one in limits) for name in peaks},
        "load": [round(one["cells"][workload.name]["load"], 2) for one in rounds for workload in workloads],
    }
    rows = [
        {"model": name, **asdict(workload), **_row(name, base, workload, facts[name], rounds)}
        for workload in workloads
        for name in facts
    ]
    return {
        "environment": facts[base]["environment"],
        "machine": machine,
        "models": [
            {"model": name, **{key: value for key, value in known.items() if key != "environment"}}
            for name, known in facts.items()
        ],
        "rows": rows,
        "rounds": list(rounds),
    }


def _row(
    name: str, base: str, workload: Workload, known: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    answers = [one["cells"][workload.name]["answers"] for one in rounds]
    mine = [one[name] for one in answers]
    if skipped := [one["skipped"] for one in mine if "skipped" in one]:
        return {"skipped": skipped[0]}
    prefill, decode = ([one[key] for one in mine] for key in ("first_token_s", "decode_s"))
    costs = {phase: Cost(**cost) for phase, cost in mine[0]["costs"].items()}
    row: dict[str, Any] = {
        "ttft_s": statistics.median(prefill),
        "prefill_tok_s": workload.batch * workload.prompt_tokens / statistics.median(prefill),
        "prefill_samples_s": workload.batch / statistics.median(prefill),
        "decode_tok_s": workload.batch * workload.new_tokens / statistics.median(decode),
        "prefill_spread": spread(prefill),
        "decode_spread": spread(decode),
        "cache_bytes": mine[0]["cache_bytes"],
        "peak_resident_bytes": max(one["peak_resident_bytes"] for one in mine),
        "peak_device_bytes": mine[0]["peak_device_bytes"],
    }
    steps = {"prefill": prefill, "decode": [one / workload.new_tokens for one in decode]}
    for phase, seconds in steps.items():
        dtype = known["product_dtype"] if phase == "prefill" else known["dtype"]
        bounds = [_bound(costs[phase], one["limits"], dtype) for one in rounds]
        shares = [None if a is None else a / b for a, b in zip(bounds, seconds, strict=True)]
        measured = [share for share in shares if share is not None]
        row[f"{phase}_bytes"], row[f"{phase}_flop"] = costs[phase].bytes, costs[phase].flop
        row[f"{phase}_flop_per_byte"] = costs[phase].flop_per_byte
        row[f"{phase}_share_of_bound"] = statistics.median(measured) if measured else None
        theirs = [one[base] for one in answers]
        if name != base and not any("skipped" in one for one in theirs):
            key = "first_token_s" if phase == "prefill" else "decode_s"
            ratio = ratio_of([one[key] for one in theirs], [one[key] for one in mine])
            row[f"{phase}_ratio"], row[f"{phase}_ratio_ci"] = ratio.value, ratio.interval
    return row


def pairs_of(
    places: Sequence[Place], rounds: Sequence[Mapping[str, Any]], workloads: Sequence[Workload]
) -> list[dict[str, Any]]:
    """How many times as fast as each of its controls a replica is, in every workload that both were timed in;
    ratios within rounds."""
    rows = []
    for place in places:
        for workload in workloads:
            found = [one["cells"][workload.name]["answers"] for one in rounds]
            timed = [(answers[place.group], answers[place.variant]) for answers in found]
            if any("skipped" in one for both in timed for one in both):
                continue
            row = {"group": place.group, "role": place.role, "control": place.variant, **asdict(workload)}
            for phase, key in (("prefill", "first_token_s"), ("decode", "decode_s")):
                ratio = ratio_of([control[key] for _, control in timed], [mine[key] for mine, _ in timed])
                row |= {f"{phase}_ratio": ratio.value, f"{phase}_ratio_ci": ratio.interval}
            rows.append(row)
    return rows


def _bound(cost: Cost, limits: Mapping[str, Any], dtype: str) -> float | None:
    """The least seconds; None where the device's peak at that dtype is not known."""
    peak = limits["peaks"].get(dtype)
    return None if peak is None else cost.bound_s(limits["bandwidth"], peak)


def _open_folder(plan: BenchPlan, name: str, digests: dict[str, str], out: Path | None) -> RunFolder:
    content = {
        "kind": "bench",
        "schema": SCHEMA,
        **plan.to_dict(),
        "weights_digests": digests,
        "versions": versions("torch", "transformers"),
    }
    return RunFolder(out or default_folder(f"bench-{name}", content), content)

"""`bench`: time models in turns, and compare their times with each other and with the machine's limits.

Every model is packed, as it would be run, in a process of its own. A round measures the machine's limits,
then every workload (`workload.py`) by every model in turn, in another order each round; figures are medians
over rounds, comparisons with the base model ratios within rounds (`timing.py`). The share of the bound
that was reached (`roofline.py`) is within rounds too.

Each workload of each round is a part of the run folder: the same command goes on where it was stopped.
"""

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bitassay.bench.engine_timer import check_timed
from bitassay.bench.roofline import Cost
from bitassay.bench.timing import INTERVAL, ratio_of, spread, turns
from bitassay.bench.worker import ProcessTimer, TimedModel
from bitassay.bench.workload import Workload
from bitassay.engines.arithmetic import Arithmetic
from bitassay.engines.engine import ENGINES, TRANSFORMERS
from bitassay.engines.hosted import check_engine
from bitassay.errors import BitassayError, at_least
from bitassay.models.config import layer_count
from bitassay.models.identity import Identity
from bitassay.models.options import as_device, as_dtype
from bitassay.models.source import engine_and_model, resolve
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe, row_names
from bitassay.quantization.replication.controls import Place, with_controls
from bitassay.record.files import check_folder
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class BenchPlan(Arithmetic):
    """What is timed: prompts of `prompt_tokens` in each of `batches`, and one prompt of each length of
    `contexts`; `repeats` rounds of all. engine: runs the model and those candidates that do not name another
    one, as ENGINE:MODEL."""

    model: str
    recipes: tuple[Recipe, ...] = ()
    candidates: tuple[str, ...] = ()
    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 5
    dtype: str = field(default="bfloat16", kw_only=True)
    threads: int | None = None
    engine: str = TRANSFORMERS

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        if self.engine != TRANSFORMERS and self.recipes:
            raise BitassayError(
                f"recipes change a model of transformers, and {self.engine} reads files",
                "--candidate FILE, of what `bitassay quantize` wrote",
            )
        for name in (self.model, *self.candidates):
            if (engine := self.placed(name)[0]) != TRANSFORMERS:
                if self.device != "cpu":
                    raise BitassayError(f"{name}: {engine} runs on the CPU here", "--device cpu for all")
                check_engine(engine)
                check_timed(ENGINES[engine], engine)
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
        """Return the workloads of a round, batches first."""
        short = [Workload("batch", batch, self.prompt_tokens, self.new_tokens) for batch in self.batches]
        return short + [Workload("context", 1, length, self.new_tokens) for length in self.contexts]

    def placed(self, name: str) -> tuple[str, str]:
        """Return the engine that runs a model, and the model, of what the plan calls it. Raises BitassayError
        for an engine that there is not."""
        engine, model = engine_and_model(name)
        if engine:
            ENGINES[engine]
        return engine or self.engine, model


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
    each with them. Raises BitassayError for bad input."""
    plan = BenchPlan(model, tuple(find_recipe(recipe) for recipe in recipes), **options)
    check_folder(out)
    for name in plan.candidates:
        check_fit(plan.placed(name)[1], trust_remote_code=trust_remote_code, progress=progress)
    check_fit(model, plan.recipes, trust_remote_code=trust_remote_code, progress=progress)
    sources = {name: resolve(plan.placed(name)[1], progress) for name in (model, *plan.candidates)}
    places = list[Place]()
    if controls and any("replication" in recipe.parts for recipe in plan.recipes):
        layers = layer_count(sources[model].folder, trust_remote_code=trust_remote_code)
        with_their_controls, places = with_controls(plan.recipes, layers)
        plan = replace(plan, recipes=with_their_controls)
    digests = {name: Identity(source).weights_digest for name, source in sources.items()}
    work = {**plan.to_dict(), "weights_digests": digests}
    folder = open_run_folder(f"bench-{sources[model].name}", run_plan("bench", work), out, progress)
    common = {
        "dtype": plan.dtype,
        "device": plan.device,
        "threads": plan.threads,
        "trust_remote_code": trust_remote_code,
        "attention": plan.attention,
    }
    timed = {BASE: TimedModel(model, engine=plan.engine, **common)}
    timed |= {recipe.name: TimedModel(model, recipe, **common) for recipe in plan.recipes}
    for name in plan.candidates:
        engine, path = plan.placed(name)
        timed[name] = TimedModel(path, engine=engine, **common)
    logs = {name: folder.path / "workers" / f"{index:02d}.log" for index, name in enumerate(timed)}
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
    source = sources[model]
    run = write_run(
        folder,
        model={"name": source.name, "origin": source.origin, "weights_digest": digests[model]},
        settings=plan.to_dict(),
        interval=INTERVAL,
        **summarise(facts, rounds, plan.workloads),
        pairs=pairs_of(places, rounds, plan.workloads),
    )
    return run, folder.path


def measure_rounds(
    names: Sequence[str],
    timer: Callable[[str], Any],
    workloads: Sequence[Workload],
    repeats: int,
    folder: RunFolder,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return facts by model; and for each round the machine's limits and, by workload, the load (runnable
    processes, over a minute) and the answer of every model. `timer` gives a model's ModelTimer or its like.
    What the folder has is not measured again."""
    facts = {
        name: folder.part(f"facts-{index:02d}", lambda name=name: timer(name).facts())
        for index, name in enumerate(names)
    }
    rounds, done, total = [], 0, repeats * sum(map(work_of, workloads))
    for round_ in range(repeats):
        prefix, order = f"round-{round_:02d}", turns(names, round_)
        limits = folder.part(f"{prefix}-limits", lambda: timer(names[0]).limits())
        cells = {}
        for workload in workloads:

            def answers(workload: Workload = workload, order: Sequence[str] = order) -> dict[str, Any]:
                load = os.getloadavg()[0]
                return {"load": load, "answers": {name: timer(name).measure(workload) for name in order}}

            cells[workload.name] = folder.part(f"{prefix}-{workload.name}", answers)
            done += work_of(workload)
            progress("timing, percent", 100 * done // total, 100)
        rounds.append({"limits": limits, "cells": cells})
    return facts, rounds


def work_of(workload: Workload) -> int:
    """Return about how much work a workload is, in tokens of a prefill. A decoding step reads all weights,
    which takes about as long as some tokens of a prefill take to compute."""
    return workload.batch * workload.prompt_tokens + workload.new_tokens * (16 + workload.batch)


def summarise(
    facts: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], workloads: Sequence[Workload]
) -> dict[str, Any]:
    """Return the parts of run.json that are made of measurements: environment, machine, models, rows, rounds.

    The first model is the base. A row is one workload by one model: medians, spread ((largest - smallest) /
    median), ratios to the base with intervals, costs, shares of the bound, peaks of memory; or `skipped`, the
    reason why there is none of that.
    """
    base = next(iter(facts))
    limits = [round_["limits"] for round_ in rounds]
    return {
        "environment": facts[base]["environment"],
        "machine": {
            "bandwidth": statistics.median(measured["bandwidth"] for measured in limits),
            "peaks": {
                name: statistics.median(measured["peaks"][name] for measured in limits)
                for name in limits[0]["peaks"]
            },
            "load": [
                round(round_["cells"][workload.name]["load"], 2)
                for round_ in rounds
                for workload in workloads
            ],
        },
        "models": [
            {"model": name, **{key: value for key, value in known.items() if key != "environment"}}
            for name, known in facts.items()
        ],
        "rows": [
            {"model": name, **asdict(workload), **_row(name, base, workload, facts[name], rounds)}
            for workload in workloads
            for name in facts
        ],
        "rounds": list(rounds),
    }


PHASES = {"prefill": "first_token_s", "decode": "decode_s"}  # the times of an answer


def _answers(rounds: Sequence[Mapping[str, Any]], workload: Workload, name: str) -> list[dict[str, Any]]:
    return [round_["cells"][workload.name]["answers"][name] for round_ in rounds]


def _row(
    name: str, base: str, workload: Workload, known: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    answers = _answers(rounds, workload, name)
    if skipped := [answer["skipped"] for answer in answers if "skipped" in answer]:
        return {"skipped": skipped[0]}
    prefill, decode = ([answer[key] for answer in answers] for key in PHASES.values())
    row: dict[str, Any] = {
        "ttft_s": statistics.median(prefill),
        "prefill_tok_s": workload.batch * workload.prompt_tokens / statistics.median(prefill),
        "prefill_samples_s": workload.batch / statistics.median(prefill),
        "decode_tok_s": workload.batch * workload.new_tokens / statistics.median(decode),
        "prefill_spread": spread(prefill),
        "decode_spread": spread(decode),
        "cache_bytes": answers[0]["cache_bytes"],
        "peak_resident_bytes": max(answer["peak_resident_bytes"] for answer in answers),
        "peak_device_bytes": answers[0]["peak_device_bytes"],
    }
    steps = {"prefill": prefill, "decode": [seconds / workload.new_tokens for seconds in decode]}
    for phase, seconds in steps.items():
        cost = Cost(**answers[0]["costs"][phase])
        product = known["product_dtype"]  # None: an engine does not say it
        dtype = known["dtype"] if phase == "decode" and product is not None else product
        shares = [
            cost.bound_s(round_["limits"]["bandwidth"], peak) / measured
            for round_, measured in zip(rounds, seconds, strict=True)
            if (peak := _peak(round_["limits"]["peaks"], phase, dtype)) is not None
        ]
        row[f"{phase}_bytes"], row[f"{phase}_flop"] = cost.bytes, cost.flop
        row[f"{phase}_flop_per_byte"] = cost.flop_per_byte
        row[f"{phase}_share_of_bound"] = statistics.median(shares) if shares else None
    return row if name == base else row | _ratios(_answers(rounds, workload, base), answers)


def _peak(peaks: Mapping[str, float], phase: str, dtype: str | None) -> float | None:
    """The peak of a dtype; a decode step whose dtype is not known is bounded by memory alone."""
    return math.inf if dtype is None and phase == "decode" else peaks.get(dtype or "")


def _ratios(base: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as fast as the base, within rounds; nothing where one was skipped."""
    if any("skipped" in answer for answer in (*base, *other)):
        return {}
    columns: dict[str, Any] = {}
    for phase, key in PHASES.items():
        ratio = ratio_of([answer[key] for answer in base], [answer[key] for answer in other])
        columns |= {f"{phase}_ratio": ratio.value, f"{phase}_ratio_ci": ratio.interval}
    return columns


def pairs_of(
    places: Sequence[Place], rounds: Sequence[Mapping[str, Any]], workloads: Sequence[Workload]
) -> list[dict[str, Any]]:
    """Return how many times as fast as each of its controls a replica is, for every workload that both were
    timed on."""
    return [
        {"group": place.group, "role": place.role, "control": place.variant, **asdict(workload), **ratios}
        for place in places
        for workload in workloads
        if (
            ratios := _ratios(
                _answers(rounds, workload, place.variant), _answers(rounds, workload, place.group)
            )
        )
    ]

"""Predictions and speed on tasks beside lm-eval's own `hf` model, on the same items, alternating in one run.

300 MMLU questions (5-shot, 30 of each of 10 evenly spaced subjects), 300 HellaSwag items and 200
ARC-Challenge questions by default. Every part (a subject of MMLU, 50 items of the others) is asked of both
models in turn, ours first in every second part; both get the very same lm-eval requests and the same loaded
model in float32, and only the answering of requests is timed, tokenization included. Each has the batch size
that suits it best on each task: of BATCHES, rows for hf and tokens for ours, the one that was fastest on that
task's first part, asked once before. The ratio is that of the summed seconds.

A prediction is the choice with the highest log-likelihood, plain and per character (`acc`, `acc_norm`); every
item where one of them differs is listed, with both models' log-likelihoods, and counts as a tie where either
model's two best are within TIE nats (per character in `acc_norm`). Parts are kept in --out: the same command
goes on. As many questions as these do not come with the package:
Run: BITASSAY_DATA=FOLDER python benchmarks/tasks.py [--model smollm2-135m] [--format table|json]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM

import bitassay
from bitassay.data.tasks import even_indices
from bitassay.evaluation.harness import BitassayLM, quiet
from bitassay.evaluation.tasks.load import AskedTask, load_tasks
from bitassay.evaluation.tasks.mmlu import mmlu_subjects
from bitassay.models.identity import identity
from bitassay.record.environment import environment
from bitassay.record.run import RunFolder

PART_ITEMS = 50
OURS, HF = "bitassay", "lm-eval hf"
BATCHES = {OURS: (256, 512, 1024, 2048), HF: (1, 2, 4, 8, 16)}
TIE = 1e-4


def requests_of(asked: AskedTask) -> list[list[Any]]:
    """lm-eval's requests, item by item."""
    with quiet():
        asked.task.set_fewshot_seed(1234)
        asked.task.build_all_requests(samples=asked.items)
    by_item: dict[int, list[Any]] = {}
    for instance in asked.task.instances:
        by_item.setdefault(instance.doc_id, []).append(instance)
    return [by_item[place] for place in range(len(asked.items))]


def timed(lm: Any, requests: Sequence[Any]) -> dict[str, Any]:
    started = time.perf_counter()
    with quiet():
        answers = lm.loglikelihood(requests, disable_tqdm=True)
    return {"seconds": time.perf_counter() - started, "answers": [value for value, _ in answers]}


def predictions(log_likelihoods: Sequence[float], choices: Sequence[str]) -> dict[str, Any]:
    """By metric: the choice, and by how much it is ahead of the next, in nats (per character)."""
    values = np.array(log_likelihoods)
    found: dict[str, Any] = {}
    for metric, own in (("acc", values), ("acc_norm", values / [float(len(choice)) for choice in choices])):
        second, first = np.sort(own)[-2:]
        found |= {metric: int(own.argmax()), f"{metric}_lead": float(first - second)}
    return found


def with_batch(lm: Any, size: int) -> Any:
    """The same model with so many rows (hf) or tokens (ours) in a forward."""
    if isinstance(lm, BitassayLM):
        lm.batch_tokens = size
    else:
        lm.batch_size_per_gpu = size
    return lm


def batch_seconds(lms: dict[str, Any], items: Sequence[Sequence[Any]]) -> dict[str, dict[str, float]]:
    """By model and size of a batch: seconds for these items. One item warms each model up."""
    flat = [instance for item in items for instance in item]
    for lm in lms.values():
        timed(lm, items[0])
    found: dict[str, dict[str, float]] = {}
    for name, sizes in BATCHES.items():
        found[name] = {str(size): timed(with_batch(lms[name], size), flat)["seconds"] for size in sizes}
        print(f"  {name}, seconds by batch: {found[name]}", file=sys.stderr, flush=True)
    return found


def measure(lms: dict[str, Any], items: Sequence[Sequence[Any]], first: str) -> dict[str, Any]:
    """Ask both models one part, `first` first."""
    flat = [instance for item in items for instance in item]
    found = {name: timed(lms[name], flat) for name in sorted(lms, key=lambda name: name != first)}
    both = {name: _by_item(found[name]["answers"], items) for name in lms}
    rows = []
    for place, item in enumerate(items):
        choices = [instance.args[1].removeprefix(" ") for instance in item]
        rows.append(
            {
                name: {"log_likelihoods": both[name][place], **predictions(both[name][place], choices)}
                for name in lms
            }
        )
    return {"seconds": {name: found[name]["seconds"] for name in lms}, "first": first, "items": rows}


def _by_item(answers: Sequence[float], items: Sequence[Sequence[Any]]) -> list[list[float]]:
    left = iter(answers)
    return [[next(left) for _ in item] for item in items]


def parts_of(
    task: str, subjects: int, per_subject: int, hellaswag: int, arc: int
) -> list[tuple[str, AskedTask, slice]]:
    """Names of parts, each with its task and which of that task's asked items are in it."""
    if task == "mmlu":
        names = mmlu_subjects()
        chosen = [f"mmlu_{names[place]}" for place in even_indices(len(names), subjects)]
        return [
            (name, load_tasks(name, per_subject, 5)[0], slice(None))
            for name in (chosen if per_subject else [])
        ]
    limit = hellaswag if task == "hellaswag" else arc
    if not limit:
        return []
    asked = load_tasks(task, limit, 0)[0]
    return [
        (f"{task}-{start:05d}", asked, slice(start, start + PART_ITEMS))
        for start in range(0, len(asked.items), PART_ITEMS)
    ]


def main(given: argparse.Namespace) -> dict[str, Any]:
    model = bitassay.load(given.model)
    sizes = (given.subjects, given.per_subject, given.hellaswag, given.arc)
    parts = {task: parts_of(task, *sizes) for task in ("mmlu", "hellaswag", "arc_challenge")}
    plan = {
        "kind": "benchmark tasks",
        "model": identity(model).weights_digest,
        "batches": BATCHES,
        "parts": {
            name: [asked.about(), str(which)] for group in parts.values() for name, asked, which in group
        },
    }
    folder = RunFolder(given.out, plan)
    with quiet():
        hf = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=1)
    lms, rows, differing, turn = {OURS: BitassayLM(model), HF: hf}, [], [], 0
    for task, group in parts.items():
        if not group:
            continue
        found, requests = [], {}

        def items_of(asked, which, requests=requests) -> list[list[Any]]:
            key = asked.leaf.name
            if key not in requests:
                requests[key] = requests_of(asked)
            return requests[key][which]

        tried = folder.part(
            f"batches-{task}", lambda part=group[0], of=items_of: batch_seconds(lms, of(*part[1:]))
        )
        best = {name: int(min(seconds, key=seconds.__getitem__)) for name, seconds in tried.items()}
        for name, size in best.items():
            with_batch(lms[name], size)
        for name, asked, which in group:
            turn += 1

            def compute(asked=asked, which=which, first=(OURS, HF)[turn % 2], of=items_of) -> dict:
                return measure(lms, of(asked, which), first)

            found.append((name, folder.part(name, compute)))
            print(f"{name}: {found[-1][1]['seconds']}", file=sys.stderr, flush=True)
        rows.append(summary(task, [part for _, part in found]) | {"batch": best, "batch_seconds": tried})
        differing += [difference for name, part in found for difference in differences(name, part)]
    return {
        "model": given.model,
        "rows": rows,
        "differing": differing,
        "sources": sorted({asked.source for group in parts.values() for _, asked, _ in group}),
        "environment": environment(),
    }


def summary(task: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = {name: sum(part["seconds"][name] for part in parts) for name in (OURS, HF)}
    items = [item for part in parts for item in part["items"]]
    gaps = [
        abs(a - b)
        for item in items
        for a, b in zip(*(item[n]["log_likelihoods"] for n in (OURS, HF)), strict=True)
    ]
    ratios = [part["seconds"][HF] / part["seconds"][OURS] for part in parts]
    return {
        "task": task,
        "n": len(items),
        "speedup": seconds[HF] / seconds[OURS],
        "speedup_range": [min(ratios), max(ratios)],
        "differing_predictions": sum(bool(_differs(item)) for item in items),
        "differing_without_ties": sum(
            any(_clearly(item, metric) for metric in _differs(item)) for item in items
        ),
        "largest_log_likelihood_gap": max(gaps),
        "seconds": seconds,
        "parts": len(parts),
    }


def _differs(item: dict[str, Any]) -> list[str]:
    """The metrics whose predictions differ."""
    return [metric for metric in ("acc", "acc_norm") if item[OURS][metric] != item[HF][metric]]


def _clearly(item: dict[str, Any], metric: str) -> bool:
    return min(item[name][f"{metric}_lead"] for name in (OURS, HF)) > TIE


def differences(name: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"part": name, "item": place, **item} for place, item in enumerate(part["items"]) if _differs(item)
    ]


def show(result: dict[str, Any]) -> None:
    print(
        f"{'task':16} {'items':>6} {'times as fast':>14} {'by part':>16} {'differing':>10} {'no ties':>8} "
        f"{'gap, nats':>10}  batch"
    )
    for row in result["rows"]:
        low, high = row["speedup_range"]
        print(
            f"{row['task']:16} {row['n']:6} {row['speedup']:14.2f} {f'{low:.2f} to {high:.2f}':>16} "
            f"{row['differing_predictions']:10} {row['differing_without_ties']:8} "
            f"{row['largest_log_likelihood_gap']:10.2g}  {row['batch'][OURS]} tokens, {row['batch'][HF]} rows"
        )
    for difference in result["differing"]:
        print(json.dumps(difference))


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--subjects", type=int, default=10, help="of MMLU")
    options.add_argument("--per-subject", type=int, default=30, help="MMLU questions of each; 0: none")
    options.add_argument("--hellaswag", type=int, default=300, help="items; 0: none")
    options.add_argument("--arc", type=int, default=200, help="items; 0: none")
    options.add_argument("--out", type=Path, default=Path("runs/benchmark-tasks"))
    options.add_argument("--format", choices=("table", "json"), default="table")
    chosen = options.parse_args()
    measured = main(chosen)
    print(json.dumps(measured, indent=2)) if chosen.format == "json" else show(measured)

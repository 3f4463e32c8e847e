"""Tasks: what share of questions a model answers rightly, beside the model it came from, with intervals and
tests.

Tasks, prompts, filters and metrics are lm-eval's (EleutherAI's lm-evaluation-harness, the extra `tasks`);
what is asked is in `questions.py`, and what runs the model is ours (`harness.py`). Two models answer the same
items, so differences are paired (`statistics.py`), and every model's p-value is also adjusted for how many
were compared with the base (Holm, within a task and metric). A generated text that holds no answer counts as
wrong, and how many do is said.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.data.tasks import even_indices
from bitassay.errors import BitassayError
from bitassay.evaluation.questions import AskedTask, leaves, protocol_id, require_lm_eval
from bitassay.evaluation.statistics import (
    NONE,
    TANGO,
    WILSON,
    Interval,
    accuracy_interval,
    holm,
    log_interval,
    logit_interval,
    mean_of,
    paired_difference,
    student_interval,
)
from bitassay.models.identity import identity
from bitassay.quantization.pipeline import quantize_once
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.runtime.model import check_recipe, quantization_of
from bitassay.record.files import check_folder, write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder, default_folder
from bitassay.record.versions import versions

SCHEMA = 1
SEED = 1234  # lm-eval's own, of the few-shot examples that a task draws
HARNESS = "lm-eval"


@dataclass(frozen=True)
class Candidate:
    """A model to ask: its name in the table, what a plan says of it, and how to get it (once, and only if
    something is left to ask)."""

    name: str
    about: dict[str, Any]
    make: Callable[[], PreTrainedModel]


def loaded_candidate(model: PreTrainedModel, name: str) -> Candidate:
    """A model as it is."""
    who, done = identity(model), quantization_of(model)
    about = {
        "model": who.name,
        "weights_digest": who.weights_digest,
        "config_digest": who.config_digest,
        "recipe": None if done is None else done.recipe.model_dump(mode="json"),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Candidate(name, about, lambda: model)


def quantized_candidate(
    base: PreTrainedModel, recipe: str | Path | Recipe, progress: Progress = silent
) -> Candidate:
    """`base` quantized by a recipe. Raises BitassayError where that is not possible."""
    found = find_recipe(recipe)
    check_recipe(base, found)
    plain = loaded_candidate(base, found.name)
    about = plain.about | {"recipe": found.model_dump(mode="json")}
    return Candidate(found.name, about, lambda: quantize_once(base, found, progress=progress))


def check_tasks(tasks: Sequence[str], limit: int | None = None) -> None:
    """Raises as `evaluate_tasks` does for names and a limit, without a model."""
    require_lm_eval()
    even_indices(1, limit)
    if not tasks:
        raise BitassayError("no task was given", "--tasks hellaswag")
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        raise BitassayError(f"the task {twice[0]!r} is named twice", "name each once")
    for task in tasks:
        leaves(task)


def evaluate_tasks(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_tokens: int | None = None,
    out: Path | None = None,
    environment: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Ask every candidate the items of `tasks`; the first is the one that the others are compared with.

    `environment` is recorded as it is. Returns the run (the content of run.json: `rows`, by task, metric and
    model) and its folder. The same call goes on where it was stopped. Raises BitassayError for unknown
    tasks, a limit below 1 or damaged data, MissingError where lm-eval or the data are not there.
    """
    check_tasks(tasks, limit)
    if out is not None:
        check_folder(out)
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise BitassayError(f"a model is missing or named twice: {names}", "name each once")
    groups = {task: [AskedTask.of(leaf, limit, shots, progress) for leaf in leaves(task)] for task in tasks}
    plan = {
        "kind": "tasks",
        "schema": SCHEMA,
        "models": {candidate.name: candidate.about for candidate in candidates},
        "tasks": {task: [question.about() for question in asked] for task, asked in groups.items()},
        "limit": limit,
        "versions": versions(HARNESS, "torch", "transformers"),
    }
    folder = RunFolder(out or default_folder(f"tasks-{candidates[0].about['model']}", plan), plan)
    progress(f"run {folder.run_id} in {folder.path}")
    answers = {
        candidate.name: _ask(candidate, index, groups, folder, batch_tokens, progress)
        for index, candidate in enumerate(candidates)
    }
    rows = [
        row
        for task, asked in groups.items()
        for row in _rows(task, protocol_id(task, asked, limit), asked, answers)
    ]
    run = {
        "schema": SCHEMA,
        "kind": "tasks",
        "run_id": folder.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": plan["models"],
        "versions": plan["versions"],
        "protocols": {task: _protocol(task, asked, limit) for task, asked in groups.items()},
        "interval": "95 %: Wilson's of an accuracy, Tango's of a paired difference, Student's t over items "
        f"of another mean (logit scale of fractions, log scale of positive values); {NONE}",
        "intervals": {"value_ci": f"{WILSON} of shares, Student's t of other means", "difference_ci": TANGO},
        "test": "exact McNemar, two-sided; Holm over the models of a task and metric",
        "visible_difference": "of accuracies, shown by exact McNemar at 5 % with power 80 %, "
        "at as many discordant items as were seen (at least 6)",
        "rows": rows,
        "environment": environment,
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def _protocol(task: str, asked: Sequence[AskedTask], limit: int | None) -> dict[str, Any]:
    return {
        "id": protocol_id(task, asked, limit),
        "harness": f"{HARNESS} {version(HARNESS)}",
        "task_versions": sorted({str(question.task.VERSION) for question in asked}),
        "sources": sorted({question.source for question in asked}),
        "tasks": len(asked),
        "items": sum(len(question.items) for question in asked),
    }


def _ask(
    candidate: Candidate,
    index: int,
    groups: Mapping[str, Sequence[AskedTask]],
    folder: RunFolder,
    batch_tokens: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """What a candidate answered, by lm-eval's task; the model is made when the first is missing."""
    from bitassay.evaluation.harness import BitassayLM

    asked = {question.leaf.name: question for group in groups.values() for question in group}
    made: list[BitassayLM] = []

    def lm() -> BitassayLM:
        if not made:
            made.append(BitassayLM(candidate.make(), batch_tokens=batch_tokens, progress=progress))
        return made[0]

    found = {}
    for place, (name, question) in enumerate(asked.items()):
        part = f"m{index}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"
        found[name] = folder.part(part, lambda q=question, p=part: answer(lm(), q, folder, p))
        progress(f"{candidate.name}: tasks", place + 1, len(asked))
    return found


def answer(lm: Any, question: AskedTask, folder: RunFolder | None = None, name: str = "") -> dict[str, Any]:
    """Ask an lm-eval model one task. `items`: for each item and filter its metrics and what was answered
    (log-likelihoods of the choices in nats, or the filtered text); `results`: lm-eval's aggregates."""
    from lm_eval.evaluator import evaluate

    from bitassay.evaluation.harness import KeptAnswers, quiet

    task, leaf = question.task, question.leaf
    with quiet():
        task.set_fewshot_seed(SEED)
        results: Any = evaluate(
            lm if folder is None else KeptAnswers(lm, folder, name),
            {"tasks": {leaf.name: task}},
            samples={leaf.name: question.items} if len(question.items) < question.available else None,
            bootstrap_iters=0,
            log_samples=True,
        )
    items = []
    for sample in results["samples"][leaf.name]:
        given = [
            found[0] if isinstance(found, (list, tuple)) else found for found in sample["filtered_resps"]
        ]
        items.append(
            {
                "item": sample["doc_id"],
                "filter": sample["filter"],
                "target": sample["target"],
                "answers": given if task.OUTPUT_TYPE != "loglikelihood_rolling" else sample["filtered_resps"],
                "metrics": {key: _plain(sample[key]) for key in sample["metrics"]},
            }
        )
    aggregates = {
        key: float(value)
        for key, value in results["results"][leaf.name].items()
        if isinstance(value, (int, float)) and "stderr" not in key and "," in key
    }
    return {"items": items, "results": aggregates}


def _plain(value: Any) -> Any:
    """A metric of one item as JSON holds it."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _rows(
    task: str, protocol: str, asked: Sequence[AskedTask], answers: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for every metric, filter and model; the first model is the base."""
    base, *others = answers
    names = [question.leaf.name for question in asked]
    first = answers[base][names[0]]["items"]
    kinds = dict.fromkeys((metric, item["filter"]) for item in first for metric in item["metrics"])
    rows = []
    for metric, filter in kinds:
        values = {
            model: [
                item["metrics"][metric]
                for name in names
                for item in answers[model][name]["items"]
                if item["filter"] == filter
            ]
            for model in answers
        }
        binary = all(not isinstance(value, list) and value in (0, 1) for v in values.values() for value in v)
        several = len({kept for m, kept in kinds if m == metric}) > 1
        found = [
            {
                "task": task,
                "metric": f"{metric} ({filter})" if several else metric,
                "model": model,
                "n": len(values[model]),
                **_value(values[model], binary, [a[name] for name in names], metric, filter),
                "unparsed": _unparsed(asked, a, filter),
                "protocol": protocol,
                **_NO_COMPARISON,
            }
            for model, a in answers.items()
        ]
        if binary:
            right = {model: [value == 1 for value in values[model]] for model in answers}
            differences = [paired_difference(right[base], right[model]) for model in others]
            adjusted = holm([difference.p_value for difference in differences])
            for row, d, p_holm in zip(found[1:], differences, adjusted, strict=True):
                row |= {
                    "against": base,
                    "difference": d.difference,
                    "difference_ci": d.interval,
                    "lost": d.first_only,
                    "gained": d.second_only,
                    "p_value": d.p_value,
                    "p_holm": p_holm,
                    "visible_difference": d.visible_difference,
                }
        rows += found
    return rows


_NO_COMPARISON = dict.fromkeys(
    ("against", "difference", "difference_ci", "lost", "gained", "p_value", "p_holm", "visible_difference")
)


def _value(
    values: Sequence[Any],
    binary: bool,
    answered: Sequence[Mapping[str, Any]],
    metric: str,
    filter: str,
) -> dict[str, Any]:
    """A metric over all items, with its interval where the items' values have one."""
    if binary:
        right = sum(value == 1 for value in values)
        return {"value": right / len(values), "value_ci": accuracy_interval(right, len(values))}
    key = f"{metric},{filter}"
    parts = [(one["results"][key], len(one["items"])) for one in answered if key in one["results"]]
    total = sum(weight for _, weight in parts)
    value = sum(found * weight for found, weight in parts) / total if parts else None
    interval = None
    if value is not None and all(isinstance(one, (int, float)) for one in values):
        mean = float(np.mean(values))
        if np.isclose(mean, value):
            interval = _mean_interval(values)
    return {"value": value, "value_ci": interval}


def _mean_interval(values: Sequence[float]) -> Interval:
    """On the scale that the values of the items suggest: fractions, positive numbers, or any."""
    mean, least, largest = mean_of(values), min(values), max(values)
    if least >= 0:
        return logit_interval(mean) if largest <= 1 else log_interval(mean)
    return student_interval(mean)


def is_letter(text: str) -> bool:
    """Whether a generated text names one of MMLU's answers, as lm-eval reads it: punctuation and case
    aside."""
    return re.sub(r"[^\w\s]", "", text).strip().upper() in ("A", "B", "C", "D")


def _unparsed(asked: Sequence[AskedTask], answers: Mapping[str, Any], filter: str) -> int | None:
    """How many generated texts hold no answer: for MMLU no letter, else none by lm-eval's filter; None where
    nothing was generated."""
    count, generated = 0, False
    for question in asked:
        if question.task.OUTPUT_TYPE != "generate_until":
            continue
        generated = True
        for item in answers[question.leaf.name]["items"]:
            if item["filter"] != filter:
                continue
            text = str(item["answers"][0]).strip()
            if question.leaf.family == "mmlu":
                count += not is_letter(text)
            else:
                count += text in ("", "[invalid]")
    return count if generated else None

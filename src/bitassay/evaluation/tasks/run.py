"""Tasks: the share of questions that each model answers rightly.
It is compared with the base model's, with intervals and tests.

Tasks, prompts, filters and metrics are those of lm-eval (EleutherAI's lm-evaluation-harness). Models answer
the same items, so differences are paired, and p-values are adjusted for as many models as were compared with
the base (Holm, within a task and metric). A generated text without an answer is wrong, and counted as
`unparsed`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.data.tasks import even_indices
from bitassay.engines.engine import TRANSFORMERS, engine_name, engine_of
from bitassay.errors import BitassayError
from bitassay.evaluation import statistics
from bitassay.evaluation.statistics import NONE, TANGO, WILSON
from bitassay.evaluation.tasks.load import AskedTask, load_tasks, protocol_id
from bitassay.evaluation.tasks.registry import check_include, find_task, require_lm_eval
from bitassay.models.identity import identity
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.runtime.model import check_recipe, quantization_of
from bitassay.record.environment import environment
from bitassay.record.files import check_folder
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan

SEED = 1234  # lm-eval's own, of the few-shot examples that a task draws
HARNESS = "lm-eval"


@dataclass(frozen=True)
class Candidate:
    """A model to ask: its name in the table, what a plan says of it, and a function that makes it, which is
    called once, and only if something is left to ask."""

    name: str
    about: dict[str, Any]
    make: Callable[[], PreTrainedModel]


def loaded_candidate(model: PreTrainedModel, name: str) -> Candidate:
    """Return a model as it is, as a candidate."""
    model_identity, done = identity(model), quantization_of(model)
    about = {
        "model": model_identity.name,
        "weights_digest": model_identity.weights_digest,
        "config_digest": model_identity.config_digest,
        "recipe": None if done is None else done.recipe.model_dump(mode="json"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    if engine_name(model) != TRANSFORMERS:
        about |= {**engine_of(model).numerics(), "recipe": model_identity.recipe_name}
    return Candidate(name, about, lambda: model)


def quantized_candidate(
    base: PreTrainedModel, recipe: str | Path | Recipe, progress: Progress = silent
) -> Candidate:
    """Return `base` quantized by a recipe. Raises BitassayError where that is not possible."""
    recipe = find_recipe(recipe)
    check_recipe(base, recipe)
    about = loaded_candidate(base, recipe.name).about | {"recipe": recipe.model_dump(mode="json")}
    return Candidate(recipe.name, about, lambda: quantize_cached(base, recipe, progress=progress))


def check_tasks(
    tasks: Sequence[str],
    limit: int | None = None,
    include: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise as `evaluate_tasks` does for names, a limit and a folder of tasks, without a model."""
    require_lm_eval()
    even_indices(1, limit)
    if not tasks:
        raise BitassayError("no task was given", "--tasks hellaswag")
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        raise BitassayError(f"the task {twice[0]!r} is named twice", "name each once")
    if include is not None:
        check_include(include, trust_remote_code)
    for task in tasks:
        find_task(task, include)


def evaluate_tasks(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Ask every candidate the items of `tasks`; the others are compared with the first.

    include: a folder with lm-eval's task YAML of one's own; what Python it names runs only with
    `trust_remote_code`. Returns the run (the content of run.json: `rows`, by task, metric and model) and its
    folder; a stopped call goes on where it was. Raises BitassayError for unknown tasks, a limit below 1 or
    damaged data, MissingError where lm-eval or the data are not here.
    """
    check_tasks(tasks, limit, include, trust_remote_code)
    check_folder(out)
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise BitassayError(f"a model is missing or named twice: {names}", "name each once")
    groups = {task: load_tasks(task, limit, shots, include=include, progress=progress) for task in tasks}
    models = {candidate.name: candidate.about for candidate in candidates}
    work = {
        "models": models,
        "tasks": {task: [question.about() for question in asked] for task, asked in groups.items()},
        "limit": limit,
    }
    base = candidates[0].about
    plan = run_plan("tasks", work, (HARNESS, "torch", "transformers"))
    folder = open_run_folder(f"tasks-{base['model']}", plan, out, progress)
    answers = {
        candidate.name: _ask(candidate, index, groups, folder, progress)
        for index, candidate in enumerate(candidates)
    }
    protocols = {task: _protocol(task, asked, limit) for task, asked in groups.items()}
    run = write_run(
        folder,
        environment=environment(base["device"]),
        model={"name": base["model"], "weights_digest": base["weights_digest"]},
        settings={"limit": limit, "versions": plan["versions"]},
        models=models,
        protocols=protocols,
        interval="95 %: Wilson's of an accuracy, Tango's of a paired difference, Student's t over items "
        f"of another mean (logit scale of fractions, log scale of positive values); {NONE}",
        intervals={"value_ci": f"{WILSON} of shares, Student's t of other means", "difference_ci": TANGO},
        test="exact McNemar, two-sided; Holm over the models of a task and metric",
        visible_difference="of accuracies, shown by exact McNemar at 5 % with power 80 %, "
        "at as many discordant items as were seen (at least 6)",
        rows=[row for task in groups for row in _rows(task, protocols[task]["id"], groups[task], answers)],
    )
    return run, folder.path


def _protocol(task: str, asked: Sequence[AskedTask], limit: int | None) -> dict[str, Any]:
    return {
        "id": protocol_id(task, asked, limit),
        "harness": f"{HARNESS} {version(HARNESS)}",
        "task_versions": sorted({str(question.task.VERSION) for question in asked}),
        "sources": sorted({question.origin for question in asked}),
        "tasks": len(asked),
        "items": sum(len(question.items) for question in asked),
    }


def _ask(
    candidate: Candidate,
    index: int,
    groups: Mapping[str, Sequence[AskedTask]],
    folder: RunFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Return what a candidate answered, by lm-eval's task; the model is made once something is missing."""
    from bitassay.evaluation.harness import BitassayLM

    asked = {question.name: question for group in groups.values() for question in group}
    lm = cache(lambda: BitassayLM(candidate.make(), progress=progress))
    answers = {}
    for count, (name, question) in enumerate(asked.items(), 1):
        part = f"m{index}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"
        answers[name] = folder.part(part, lambda q=question, p=part: answer(lm(), q, folder, p))
        progress(f"{candidate.name}: tasks", count, len(asked))
    return answers


def answer(lm: Any, question: AskedTask, folder: RunFolder | None = None, name: str = "") -> dict[str, Any]:
    """Ask an lm-eval model one task. `items`: for each item and filter its metrics and what was answered
    (log-likelihoods of the choices in nats, or the filtered text); `results`: lm-eval's aggregates."""
    from lm_eval.evaluator import evaluate

    from bitassay.evaluation.harness import KeptAnswers, quiet

    task = question.task
    with quiet():
        task.set_fewshot_seed(SEED)
        results: Any = evaluate(
            lm if folder is None else KeptAnswers(lm, folder, name),
            {"tasks": {question.name: task}},
            samples={question.name: question.items} if len(question.items) < question.available else None,
            bootstrap_iters=0,
            log_samples=True,
        )
    is_rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    items = [
        {
            "item": sample["doc_id"],
            "filter": sample["filter"],
            "target": sample["target"],
            "answers": [
                response[0] if isinstance(response, (list, tuple)) and not is_rolling else response
                for response in sample["filtered_resps"]
            ],
            "metrics": {key: _plain(sample[key]) for key in sample["metrics"]},
        }
        for sample in results["samples"][question.name]
    ]
    aggregates = {
        key: float(value)
        for key, value in results["results"][question.name].items()
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
    names = [question.name for question in asked]
    first = answers[base][names[0]]["items"]
    kinds = dict.fromkeys((metric, item["filter"]) for item in first for metric in item["metrics"])
    rows = []
    for metric, filter in kinds:
        answered = {model: [by_task[name] for name in names] for model, by_task in answers.items()}
        values = {
            model: [
                item["metrics"][metric]
                for task_answers in all_answers
                for item in task_answers["items"]
                if item["filter"] == filter
            ]
            for model, all_answers in answered.items()
        }
        binary = all(not isinstance(value, list) and value in (0, 1) for v in values.values() for value in v)
        has_filters = [kept for kept, _ in kinds].count(metric) > 1
        comparisons = _comparisons(base, others, values) if binary else {}
        rows += [
            {
                "task": task,
                "metric": f"{metric} ({filter})" if has_filters else metric,
                "model": model,
                "n": len(values[model]),
                **_value(values[model], binary, answered[model], f"{metric},{filter}"),
                "unparsed": _unparsed(asked, by_task, filter),
                "protocol": protocol,
                **comparisons.get(model, _NO_COMPARISON),
            }
            for model, by_task in answers.items()
        ]
    return rows


_NO_COMPARISON: dict[str, Any] = dict.fromkeys(
    ("against", "difference", "difference_ci", "lost", "gained", "p_value", "p_holm", "visible_difference")
)


def _comparisons(
    base: str, others: Sequence[str], values: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """By model, the columns that compare it with the base on items that are right (1) or wrong."""
    right = {model: [value == 1 for value in of_model] for model, of_model in values.items()}
    differences = [statistics.paired_difference(right[base], right[model]) for model in others]
    adjusted = statistics.holm([difference.p_value for difference in differences])
    return {
        model: {
            "against": base,
            "difference": difference.difference,
            "difference_ci": difference.interval,
            "lost": difference.first_only,
            "gained": difference.second_only,
            "p_value": difference.p_value,
            "p_holm": p_holm,
            "visible_difference": difference.visible_difference,
        }
        for model, difference, p_holm in zip(others, differences, adjusted, strict=True)
    }


def _value(
    values: Sequence[Any], binary: bool, answered: Sequence[Mapping[str, Any]], key: str
) -> dict[str, Any]:
    """A metric over all items, with its interval where the items' values have one."""
    if binary:
        right = sum(value == 1 for value in values)
        return {"value": right / len(values), "value_ci": statistics.wilson_interval(right, len(values))}
    parts = [(part["results"][key], len(part["items"])) for part in answered if key in part["results"]]
    if not parts:
        return {"value": None, "value_ci": None}
    value = sum(result * weight for result, weight in parts) / sum(weight for _, weight in parts)
    if not all(isinstance(item, (int, float)) for item in values) or not np.isclose(np.mean(values), value):
        return {"value": value, "value_ci": None}  # no mean of the items
    mean = statistics.mean_of(values)
    if min(values) < 0:
        return {"value": value, "value_ci": statistics.student_interval(mean)}
    make = statistics.logit_interval if max(values) <= 1 else statistics.log_interval
    return {"value": value, "value_ci": make(mean)}


def _unparsed(asked: Sequence[AskedTask], answers: Mapping[str, Any], filter: str) -> int | None:
    """How many generated texts hold no answer; None where nothing was generated."""
    generated = [question for question in asked if question.task.OUTPUT_TYPE == "generate_until"]
    texts = [
        question.unparsed(str(item["answers"][0]))
        for question in generated
        for item in answers[question.name]["items"]
        if item["filter"] == filter
    ]
    return sum(texts) if generated else None

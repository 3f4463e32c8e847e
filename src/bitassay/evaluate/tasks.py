"""Tasks: what share of questions a model answers rightly, beside the model it came from, with intervals and
tests.

Tasks, prompts, filters and metrics are lm-eval's (EleutherAI's lm-evaluation-harness, the extra `tasks`);
what runs the model is ours (`harness.py`). Data comes from `data/tasks.py` or, for whole sets and other
tasks, from the hub. Two models answer the same items, so differences are paired (`statistics.py`), and every
model's p-value is also adjusted for how many were compared with the base (Holm, within a task and metric).

Names: a task of lm-eval, or a group of them, whose items are pooled. `mmlu` asks for the letter with the
highest likelihood, `mmlu_generative` for a greedy text that lm-eval's filter then reads: a text that is no
letter counts as wrong, and how many are is said. Both show 5 examples, other tasks as many as lm-eval says.
A limit is a number of items of each task in a group, hence of each MMLU subject, evenly spaced.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.data.tasks import TaskData, even_indices, mmlu_subjects, task_data
from bitassay.errors import BitassayError, MissingError, nearest
from bitassay.evaluate.statistics import (
    accuracy_interval,
    bootstrap_means,
    holm,
    paired_difference,
    percentile_interval,
)
from bitassay.models.load import identity
from bitassay.quantize.model import check_recipe, quantization_of
from bitassay.quantize.pipeline import quantize_once
from bitassay.quantize.recipe import Recipe, find_recipe
from bitassay.record.files import write_json
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SCHEMA = 1
SEED = 1234  # lm-eval's own, of the few-shot examples that a task draws
DEFAULT_SHOTS = {"mmlu": 5}
HARNESS = "lm-eval"
FOLDERS = {"hellaswag": "hellaswag", "arc_challenge": "arc"}  # of lm-eval's tasks


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


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval: `family` is a data set that `data/tasks.py` knows, or None."""

    name: str
    family: str | None = None
    subject: str | None = None


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
    require_lm_eval()
    even_indices(1, limit)
    if not candidates or not tasks:
        raise BitassayError("no task was given" if candidates else "no model was given", "--tasks hellaswag")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or len(set(tasks)) < len(tasks):
        raise BitassayError(f"something is named twice in {names} or {list(tasks)}", "name each once")
    groups = {task: [AskedTask.of(leaf, limit, shots, progress) for leaf in leaves(task)] for task in tasks}
    plan = {
        "kind": "tasks",
        "schema": SCHEMA,
        "models": {candidate.name: candidate.about for candidate in candidates},
        "tasks": {task: [question.about() for question in asked] for task, asked in groups.items()},
        "limit": limit,
        "versions": {name: version(name) for name in ("bitassay", HARNESS, "torch", "transformers")},
    }
    out = out or Path("runs") / f"tasks-{candidates[0].about['model']}-{digest_json(plan)[:8]}"
    folder = RunFolder(out, plan)
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
        "interval": "95 %: Wilson's of an accuracy, Tango's of a paired difference",
        "test": "exact McNemar, two-sided; Holm over the models of a task and metric",
        "visible_difference": "of accuracies, shown by exact McNemar at 5 % with power 80 %, "
        "at as many discordant items as were seen (at least 6)",
        "rows": rows,
        "environment": environment,
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def require_lm_eval() -> None:
    """Raises MissingError that says which extra has it."""
    if find_spec("lm_eval") is None:
        raise MissingError("tasks need lm-eval, which is not installed", "pip install 'bitassay[tasks]'")


def leaves(task: str) -> list[Leaf]:
    """The tasks of lm-eval that a name stands for. Names other than MMLU's, hellaswag and arc_challenge are
    left to lm-eval, which raises at loading."""
    if task in FOLDERS:
        return [Leaf(task, task)]
    subjects = mmlu_subjects()
    if task in ("mmlu", "mmlu_generative"):
        ending = task.removeprefix("mmlu")
        return [Leaf(f"mmlu_{subject}{ending}", "mmlu", subject) for subject in subjects]
    subject = task.removeprefix("mmlu_").removesuffix("_generative")
    if task.startswith("mmlu_") and subject in subjects:
        return [Leaf(task, "mmlu", subject)]
    return [Leaf(name) for name in _foreign_leaves(task)]


def _foreign_leaves(task: str) -> list[str]:
    """The tasks of a name that only lm-eval knows."""
    index, found, todo = _index(None), [], [task]
    if task not in index:
        known = [*FOLDERS, "mmlu", "mmlu_generative", *(name for name in index if "_" not in name)]
        raise BitassayError(
            f"lm-eval knows no task {task!r}; the nearest are {nearest(task, known)}", "lm_eval ls tasks"
        )
    from lm_eval.tasks._yaml_loader import load_yaml

    while todo:
        name = todo.pop(0)
        entry = index.get(name)
        if entry is None:
            raise BitassayError(f"{task}: lm-eval has no task {name!r} in it", "name its tasks one by one")
        if entry.kind.name == "TAG":
            todo += sorted(entry.tags)
        elif entry.kind.name == "GROUP":
            for member in load_yaml(entry.yaml_path, resolve_func=False).get("task", []):
                if not isinstance(member, str):
                    raise BitassayError(
                        f"{task}: its part {name} is defined in place, which is not read here",
                        "name its tasks one by one",
                    )
                todo.append(member)
        else:
            found.append(name)
    return found


@cache
def _index(folder: str | None) -> Mapping[str, Any]:
    """lm-eval's index of tasks, by name; of one folder of them, or of all, which takes a while."""
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager().task_index
    path = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path)).task_index


@dataclass(frozen=True)
class AskedTask:
    """A task with its data, and which items of it are asked, by their places."""

    leaf: Leaf
    task: "ConfigurableTask"
    shots: int
    data: TaskData | None
    items: list[int]
    available: int

    @classmethod
    def of(cls, leaf: Leaf, limit: int | None, shots: int | None, progress: Progress = silent) -> "AskedTask":
        """Load a task. Errors as `evaluate_tasks`."""
        from bitassay.evaluate.harness import quiet

        data = None if leaf.family is None else task_data(leaf.family, limit, leaf.subject)
        if data is None:
            progress(f"{leaf.name}: looking for its data on the hub")
        with quiet():
            task = _load(leaf, data)
            shots = _set_shots(task, leaf, shots)
            available = len(task.eval_docs)
        return cls(leaf, task, shots, data, even_indices(available, limit), available)

    def about(self) -> dict[str, Any]:
        """What a plan says of it: all that decides which requests are made."""
        return {
            "name": self.leaf.name,
            "version": self.task.VERSION,
            "shots": self.shots,
            "source": self.source,
            "digest": None if self.data is None else self.data.digest,
            "items": self.items if len(self.items) < self.available else self.available,
        }

    @property
    def source(self) -> str:
        return f"hub {self.task.DATASET_PATH}" if self.data is None else self.data.source


def _load(leaf: Leaf, data: TaskData | None) -> "ConfigurableTask":
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    if leaf.family == "mmlu":
        folder = "mmlu/generative" if leaf.name.endswith("_generative") else "mmlu/default"
    else:
        folder = FOLDERS.get(leaf.name)
    entry = _index(folder)[leaf.name]
    config = load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if "class" in config or config.get("unsafe_code"):
        raise BitassayError(
            f"{leaf.name}: a task with code of its own, which is not run here",
            "lm_eval --tasks, for such a task",
        )
    if data is not None:
        splits = {name: datasets.Dataset.from_list(rows) for name, rows in data.splits.items()}
        config["custom_dataset"] = lambda **_: splits
        for split in ("training_split", "validation_split", "test_split"):
            if config.get(split) not in splits:
                config[split] = None
    try:
        return ConfigurableTask(config=config)
    except BitassayError:
        raise
    except Exception as error:  # whatever the data sets' library, the network and the task's YAML may raise
        if data is not None:
            raise
        raise MissingError(
            f"{leaf.name}: the data are not on this machine and could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            "connect to the hub, point BITASSAY_DATA at a folder of data sets, or give a smaller --limit for "
            "the bundled items of mmlu (5 of each subject), hellaswag and arc_challenge (200)",
        ) from error


def _set_shots(task: "ConfigurableTask", leaf: Leaf, shots: int | None) -> int:
    """Show so many examples (None: as many as is usual), and say how many that is."""
    configured = task.get_config("num_fewshot")
    wanted = shots if shots is not None else (configured or DEFAULT_SHOTS.get(leaf.family or "", 0))
    if wanted < 0 or (shots and configured == 0):
        raise BitassayError(f"{leaf.name} cannot be asked with {shots} examples", "leave --shots out")
    available = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if wanted > available:
        raise BitassayError(
            f"{leaf.name}: {wanted} examples were asked for, there are {available}", "fewer --shots"
        )
    task.set_config("num_fewshot", wanted)
    return wanted


def protocol_id(task: str, asked: Sequence[AskedTask], limit: int | None) -> str:
    """Everything about the items and the prompt that changes the number: `mmlu/5-shot[n=30/subject]`."""
    counts, shots = {len(question.items) for question in asked}, {question.shots for question in asked}
    chosen = []
    if limit is not None:
        each = "/subject" if task in ("mmlu", "mmlu_generative") else "/task" if len(asked) > 1 else ""
        chosen.append(f"n={max(counts)}{each}")
    if any(question.data is not None and not question.data.whole for question in asked):
        chosen.append("of the bundled slice")
    return f"{task}/{'-'.join(map(str, sorted(shots)))}-shot" + (f"[{' '.join(chosen)}]" if chosen else "")


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
    from bitassay.evaluate.harness import BitassayLM

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

    from bitassay.evaluate.harness import KeptAnswers, quiet

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
            interval = percentile_interval(
                bootstrap_means(np.array(values, dtype=np.float64), 0), len(values)
            )
    return {"value": value, "value_ci": interval}


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
                count += re.sub(r"[^\w\s]", "", text).strip().upper() not in ("A", "B", "C", "D")
            else:
                count += text in ("", "[invalid]")
    return count if generated else None

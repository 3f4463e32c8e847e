"""Which tasks lm-eval has, and one of them with its data: what to ask, and nothing about who is asked.

A name is a task of lm-eval or a group of them, whose items are pooled. `mmlu` asks for the letter with the
highest likelihood, `mmlu_generative` for a greedy text that lm-eval's filter then reads. Both show 5
examples, other tasks as many as lm-eval says. A limit is a number of items of each task in a group, hence of
each MMLU subject, evenly spaced. Data comes from `data/tasks.py` or, for whole sets and other tasks, from the
hub.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.data.tasks import TaskData, even_indices, mmlu_subjects, task_data
from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.record.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

DEFAULT_SHOTS = {"mmlu": 5}
FOLDERS = {"hellaswag": "hellaswag", "arc_challenge": "arc"}  # of lm-eval's tasks


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval: `family` is a data set that `data/tasks.py` knows, or None."""

    name: str
    family: str | None = None
    subject: str | None = None


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
        raise BitassayError(f"lm-eval knows no task {task!r}; {suggestion(task, known)}", "lm_eval ls tasks")
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
        from bitassay.evaluation.harness import quiet

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

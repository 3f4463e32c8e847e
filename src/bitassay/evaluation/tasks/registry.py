"""The tasks that this package has data for, and where the other tasks of lm-eval are found.

A new task is one file like `hellaswag.py` and one line in TASKS. Another package adds one by an entry point
in the group `bitassay.tasks` that names a TaskSource. A name is looked up in the user's folder
(`--include-path`), then in TASKS, then in lm-eval.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bitassay.data.tasks import TaskSource
from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.evaluation.tasks import mmlu
from bitassay.evaluation.tasks.arc_challenge import ARC_CHALLENGE
from bitassay.evaluation.tasks.hellaswag import HELLASWAG
from bitassay.record.files import read_text
from bitassay.registry import Registry

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASKS: Registry[TaskSource] = Registry(
    "tasks",
    {
        "mmlu": mmlu.DIRECT,
        "mmlu_generative": mmlu.GENERATIVE,
        "hellaswag": HELLASWAG,
        "arc_challenge": ARC_CHALLENGE,
    },
)


def require_lm_eval() -> None:
    """Raise MissingError that names the extra where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingError("tasks need lm-eval, which is not installed", "pip install 'bitassay[tasks]'")


def find_task(name: str, include: Path | None = None) -> "tuple[TaskManager, TaskSource | None, list[str]]":
    """Return lm-eval's manager that knows a task or group, our source of it (None: lm-eval's own), and for a
    source the tasks that the name stands for. Raises BitassayError for an unknown name."""
    if include is not None and name in (index := manager_of(include).task_index):
        # A group may name tasks of lm-eval, whose index takes long to read.
        return manager_of(include, defaults=index[name].kind.name == "GROUP"), None, []
    for registered, source in TASKS.items():
        manager = manager_of(yaml_path(source))
        tasks = source_tasks(source)
        if name == registered or name in tasks:
            return manager, source, tasks if name == registered else [name]
    manager = manager_of(None)
    if name not in manager.task_index:
        known = [*TASKS, *(known for known in manager.task_index if "_" not in known)]
        raise BitassayError(f"lm-eval knows no task {name!r}; {suggestion(name, known)}", "lm_eval ls tasks")
    return manager, None, []


def yaml_path(source: TaskSource) -> Path:
    """Return where the YAML of a source is."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / source.yaml


def source_tasks(source: TaskSource) -> list[str]:
    """Return the names of a source's tasks, in alphabetical order."""
    path = yaml_path(source)
    return sorted(
        name
        for name, entry in manager_of(path).task_index.items()
        if entry.kind.name == "TASK" and (file := entry.yaml_path) and path in (file, *file.parents)
    )


@cache
def manager_of(path: Path | None, defaults: bool = False) -> "TaskManager":
    """Return lm-eval's manager of the tasks in a folder or in the folder of a file, with `defaults` of
    lm-eval's own too; None: of lm-eval's own alone, which takes half a minute."""
    from lm_eval.tasks import TaskManager

    folder = path if path is None or path.is_dir() else path.parent
    return TaskManager(include_path=folder, include_defaults=defaults or path is None)


def check_include(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder without task YAML; without `trust_remote_code` also YAML that names Python code, there
    or in what it includes. Nothing is run to find out."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise BitassayError(f"{folder}: no task YAML in it", "--include-path a folder that holds NAME.yaml")
    for path in () if trust_remote_code else files:  # grows by what they include
        try:
            text = read_text(path)
            tags = [event.tag for event in yaml.parse(text) if getattr(event, "tag", None)]
            if any("python" in tag or (len(tag) > 1 and tag.startswith("!")) for tag in tags):
                raise BitassayError(
                    f"{path}: names Python code, which runs when the task is loaded",
                    "--trust-remote-code, if you trust who wrote that folder",
                )
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BitassayError(f"{path}: not YAML ({error})", "mend or remove the file") from error
        included = content.get("include", []) if isinstance(content, dict) else []
        names = [included] if isinstance(included, str) else included
        files += [extra for name in names if (extra := path.parent / name) not in files]

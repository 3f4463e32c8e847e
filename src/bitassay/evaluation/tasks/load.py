"""A task of lm-eval with its data: what to ask, and nothing about who is asked.

A name is a task or a group, whose items are pooled. `mmlu` asks for the letter with the highest likelihood,
`mmlu_generative` for a greedy text that lm-eval's filter then reads. A limit is a number of items of each
task in a group, hence of each MMLU subject, evenly spaced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.data.tasks import TaskData, TaskSource, even_indices
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.tasks.registry import find_task
from bitassay.record.files import read_text
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


@dataclass(frozen=True)
class AskedTask:
    """A task with its data, and the indices of its items that are asked.

    origin: where the items are from; digest: of local data; is_complete: False for a slice.
    """

    name: str
    task: "ConfigurableTask"
    shots: int
    origin: str
    digest: str | None
    is_complete: bool
    items: list[int]
    available: int
    unparsed: Callable[[str], bool]

    def about(self) -> dict[str, Any]:
        """Return what a plan says of the task: all that decides which requests are made."""
        return {
            "name": self.name,
            "version": self.task.VERSION,
            "shots": self.shots,
            "source": self.origin,
            "digest": self.digest,
            "items": self.items if len(self.items) < self.available else self.available,
        }


def load_tasks(
    name: str,
    limit: int | None = None,
    shots: int | None = None,
    *,
    include: Path | None = None,
    progress: Progress = silent,
) -> list[AskedTask]:
    """Load the tasks that a name stands for, with `shots` examples (None: as many as is usual). Raises
    BitassayError for an unknown name, a bad number of examples and damaged data, MissingError for data that
    are not here."""
    from bitassay.evaluation.harness import quiet

    manager, source, members = find_task(name, include)
    data, spec = dict[str, TaskData | None](), list[dict[str, Any]]()
    for member in members:
        assert source is not None
        config = manager.task_index[member].cfg or {}
        data[member] = source.read(limit, config["dataset_name"] if source.has_subjects else None)
        spec.append({"task": member, **_overrides(config, data[member])})
    if not data or None in data.values():
        progress(f"{name}: looking for its data")
    with quiet():
        try:
            tasks = manager.load([{"group": name, "task": spec} if spec else name])["tasks"]
        except Exception as error:  # whatever the data sets' library, the network and a task's YAML may raise
            if data and None not in data.values():
                raise
            first_line = str(error).partition("\n")[0]
            raise MissingError(
                f"{name}: cannot be loaded ({type(error).__name__}: {first_line})",
                "connect to the hub, point BITASSAY_DATA at a folder of data sets, give a smaller --limit "
                "for the bundled items of mmlu (5 of each subject), hellaswag and arc_challenge (200), or "
                "mend the YAML of a task of your own",
            ) from error
        return [
            _asked(leaf, task, source or TaskSource(""), data.get(leaf), limit, shots, include)
            for leaf, task in tasks.items()
        ]


def _overrides(config: dict[str, Any], data: TaskData | None) -> dict[str, Any]:
    """What of a task's YAML is changed, so that it reads local data and no split that is not there."""
    if data is None:
        return {}
    import datasets

    splits = {name: datasets.Dataset.from_list(rows) for name, rows in data.splits.items()}
    keys = ("training_split", "validation_split", "test_split")
    absent = [key for key in keys if config.get(key) not in splits]
    return {"custom_dataset": lambda **_: splits, **dict.fromkeys(absent)}


def _asked(
    name: str,
    task: Any,
    source: TaskSource,
    data: TaskData | None,
    limit: int | None,
    shots: int | None,
    include: Path | None,
) -> AskedTask:
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask) or task.config.unsafe_code:
        raise BitassayError(
            f"{name}: a task with code of its own, which is not run here", "lm_eval --tasks, for such a task"
        )
    yaml_file = Path(task.config.metadata["config_source"])  # type: ignore[index]
    if data is not None:
        origin, digest = data.source, data.digest
    elif include is not None and include.resolve() in yaml_file.resolve().parents:
        origin, digest = str(yaml_file), digest_json([read_text(yaml_file), repr(task.eval_docs[:])])
    else:
        origin, digest = f"hub {task.DATASET_PATH}", None
    return AskedTask(
        name=name,
        task=task,
        shots=_set_shots(task, name, shots, source.shots),
        origin=origin,
        digest=digest,
        is_complete=data is None or data.is_complete,
        items=even_indices(len(task.eval_docs), limit),
        available=len(task.eval_docs),
        unparsed=source.unparsed,
    )


def _set_shots(task: "ConfigurableTask", name: str, shots: int | None, usual: int) -> int:
    """Show so many examples (None: as many as the YAML says, else `usual`), and return how many that is."""
    configured = task.get_config("num_fewshot")
    wanted = shots if shots is not None else (configured or usual)
    if wanted < 0 or (shots and configured == 0):
        raise BitassayError(f"{name} cannot be asked with {shots} examples", "leave --shots out")
    available = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if wanted > available:
        raise BitassayError(
            f"{name}: {wanted} examples were asked for, there are {available}", "fewer --shots"
        )
    task.set_config("num_fewshot", wanted)
    return wanted


def protocol_id(task: str, asked: Sequence[AskedTask], limit: int | None) -> str:
    """Return everything about items and prompt that changes the number: `mmlu/5-shot[n=30/subject]`."""
    counts, shots = {len(question.items) for question in asked}, {question.shots for question in asked}
    chosen = []
    if limit is not None:
        each = "/subject" if task in ("mmlu", "mmlu_generative") else "/task" if len(asked) > 1 else ""
        chosen.append(f"n={max(counts)}{each}")
    if not all(question.is_complete for question in asked):
        chosen.append("of the bundled slice")
    return f"{task}/{'-'.join(map(str, sorted(shots)))}-shot" + (f"[{' '.join(chosen)}]" if chosen else "")

"""A run folder: the plan of a long piece of work and every part of it that is finished.

Parts are written whole, so an interrupted run loses at most the part it was working on; running the same
command again opens the same folder and goes on. A folder belongs to one plan: a different plan is refused
instead of mixed in, and so is other code (`versions`, an entry of the plan), which might make other parts.

    plan.json            what is to be done; never changes
    parts/<name>.json    a finished part
    parts/<name>.safetensors
    run.json             the result
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.errors import BitassayError
from bitassay.record.files import atomic_file, explained, read_json, write_json
from bitassay.record.hashing import canonical_json, digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.versions import versions

if TYPE_CHECKING:
    from torch import Tensor


SCHEMA = 2  # of plan.json and run.json
REMOVE = "remove this file and run the same command again"
AGAIN = "finish it with what it began with, or give another --out to begin anew"


def default_folder(name: str, plan: Mapping[str, Any]) -> Path:
    """Return the folder of a run that was given none: the same for the same work by other code, so that going
    on after an upgrade is noticed."""
    work = {key: value for key, value in plan.items() if key != "versions"}
    return Path("runs") / f"{name}-{digest_json(work)[:8]}"


def run_plan(
    kind: str, work: Mapping[str, Any], packages: Sequence[str] = ("torch", "transformers")
) -> dict[str, Any]:
    """Return the plan of a run: its kind, the work, and the versions of this package and of `packages`."""
    return {"kind": kind, "schema": SCHEMA, **work, "versions": versions(*packages)}


def open_run_folder(
    name: str, plan: dict[str, Any], out: Path | None = None, progress: Progress = silent
) -> "RunFolder":
    """Open the folder of a plan at `out`, by default runs/NAME-DIGEST. Raises BitassayError as RunFolder."""
    folder = RunFolder(out or default_folder(name, plan), plan)
    progress(f"run {folder.run_id} in {folder.path}")
    return folder


class RunFolder:
    """The folder of one plan. Raises BitassayError where it cannot be written or holds something else."""

    def __init__(self, path: Path, plan: dict[str, Any]):
        self.path, self.plan = Path(path), plan
        self.run_id = digest_json(plan)[:12]
        plan_file = self.path / "plan.json"
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            occupied = any(self.path.iterdir())
        if plan_file.exists():
            old = read_json(plan_file)
            changed = _differences(old, plan)
            if changed == ["versions"]:
                began = old.get("versions") or {}
                raise BitassayError(
                    f"{self.path}: holds a run that began with {differing(began, plan['versions'])}", AGAIN
                )
            if changed:
                raise BitassayError(
                    f"{self.path}: holds a run of another plan (different: {', '.join(changed)})",
                    "give another --out, or remove that folder",
                )
        elif occupied:
            raise BitassayError(
                f"{self.path}: the folder is not empty and holds no run", "give another --out"
            )
        else:
            write_json(plan_file, plan)

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of a part: read where it is finished, else computed and written."""
        path = self.path / "parts" / f"{name}.json"
        if path.exists():
            return read_json(path)
        value = compute()
        write_json(path, value)
        return value

    def has(self, name: str) -> bool:
        """Return whether the JSON value of a part is finished."""
        return (self.path / "parts" / f"{name}.json").exists()

    def has_tensors(self, name: str) -> bool:
        """Return whether the tensors of a part are finished."""
        return (self.path / "parts" / f"{name}.safetensors").exists()

    def write_tensors(self, name: str, tensors: "dict[str, Tensor]") -> None:
        """Keep tensors as a finished part."""
        from safetensors.torch import save_file

        with atomic_file(self.path / "parts" / f"{name}.safetensors") as temporary:
            save_file({key: tensor.cpu() for key, tensor in tensors.items()}, temporary)

    def tensor_names(self, name: str) -> list[str]:
        """Return what the tensors of a finished part are called. Raises BitassayError as `read_tensors`."""
        with self._opened(name) as file:
            return list(file.keys())

    def read_tensor(self, name: str, key: str) -> "Tensor":
        """Return one tensor of a finished part. Raises BitassayError as `read_tensors`."""
        with self._opened(name) as file:
            return file.get_tensor(key)

    @contextmanager
    def _opened(self, name: str) -> "Iterator[Any]":
        from safetensors import SafetensorError, safe_open

        path = self.path / "parts" / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise BitassayError(f"{path}: damaged ({error})", REMOVE) from error

    def read_tensors(self, name: str) -> "dict[str, Tensor]":
        """Return the tensors of a finished part. Raises BitassayError that names a damaged file."""
        with self._opened(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping


def differing(began: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return the versions that differ: `torch 2.13.0, not 2.14.0`; an empty text where none does."""
    return ", ".join(
        f"{name} {began.get(name, 'none')}, not {here.get(name, 'none')}"
        for name in sorted(began.keys() | here.keys())
        if began.get(name) != here.get(name)
    )


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return ["plan.json"]
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if canonical_json(old.get(key)) != canonical_json(new.get(key))
    ]

"""run.json: the result of a command, in one schema for every kind of run, written and read back here.

    schema_version, kind, run_id, created   what the file is
    model, settings                         which model, and what was asked of it
    environment                             the machine and the versions behind the numbers
    interval, intervals                     how intervals were made: in words, and by column
    rows, ...                               the tables of the kind (KINDS): lists of flat rows
    ...                                     what else the kind has, such as texts or protocols

An interval stands beside its value: `ppl` and `ppl_ci`. A file may come from anyone, so its size is checked
first, then every value (finite numbers, bounded texts and lists, intervals in order), then the fields. What a
value may be, such as a share or a count, its column says (`report/columns.yaml`), which refuses any other.
Files of schema 1 are read as if they were new.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.record.files import read_json, write_json
from bitassay.record.run import SCHEMA, RunFolder
from bitassay.record.schema import defects

MOST_NUMBER = 1e200  # the axis of a plot needs room beyond
MOST_LETTERS = 1_000_000
MOST_ITEMS = 100_000
MOST_DEPTH = 20

Content = dict[str, Any]
_EMPTY: Content = {"model": {}, "settings": {}, "interval": "", "intervals": {}}
Text = Annotated[str, Field(max_length=10_000)]


@dataclass(frozen=True)
class Kind:
    """A kind of run. command: what writes it; tables: its lists of rows; parts: what else it has, as names
    with spaces between them."""

    command: str
    tables: str = "rows"
    parts: str = ""

    @property
    def names(self) -> list[str]:
        return [*self.tables.split(), *self.parts.split()]


_STUDY = "study about"
KINDS = {
    "assay": Kind("assay", "rows pairs", "protocol recipes verification seconds"),
    "evaluation": Kind("eval"),
    "tasks": Kind("eval --tasks", "rows", "models protocols test visible_difference"),
    "generation": Kind("generate", "rows", "prompts texts"),
    "bench": Kind("bench", "rows models pairs", "machine rounds"),
    "matmul": Kind("bench matmul"),
    "attack": Kind("attack", "rows costs honest left_out", "about numerics_pooled timed"),
    "audit": Kind("audit", "rows probes suspects", "decision calibration sequence receipts"),
    "watch": Kind("audit --watch", "rows", "decision"),
    "change": Kind("audit --against", "rows", "decision"),
    "contract": Kind("audit --contract", "rows", "decision problems"),
    "search": Kind("search", "rows trials", "best importance"),
    "analysis": Kind("quantize --analyze", "layers matrices routing", "recipe text whole"),
    "eight-bit": Kind(
        "study run task3.1", "rows pairs claims", f"{_STUDY} protocols uneven_groups speed products"
    ),
    "replication": Kind(
        "study run control-table", "rows pairs drafts claims", f"{_STUDY} protocol corpus_source"
    ),
    "experiments": Kind("study run exp1", "rows missing left_out"),
    "separability": Kind("study run separability", "rows missing"),
    "thresholds": Kind("calibrate --study", "rows missing left_out"),
    "studies": Kind("study run exp1", "rows runs"),
}


class Run(BaseModel):
    """The fields that every run has; those of its kind are the extra ones."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: Literal[2]
    kind: Text
    run_id: Text
    created: Text
    model: dict[Text, Any]
    settings: dict[Text, Any]
    environment: dict[Text, Any]
    interval: Text
    intervals: dict[Text, Any]

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> "Run":
        fields, kind = self.__pydantic_extra__ or {}, KINDS[self.kind]
        if missing := [name for name in kind.names if name not in fields]:
            raise ValueError("; ".join(f"{name} is missing" for name in missing))
        if unknown := fields.keys() - set(kind.names):
            raise ValueError(f"a run of kind {self.kind!r} has no {min(unknown)}")
        for name in kind.tables.split():
            rows = fields[name]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"{name} is not a list of objects")
        return self


def new_run(kind: str, *, run_id: str = "", **fields: Any) -> Content:
    """Return a run, dated now, as `read_run` reads it: fields are those of `Run` and of its kind. The
    environment is this machine's where none is given. Raises BitassayError for a number that is not finite.
    """
    if "environment" not in fields:
        from bitassay.record.environment import environment  # needs torch, which reading does not

        fields["environment"] = environment()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"schema_version": SCHEMA, "kind": kind, "run_id": run_id, "created": created}
    run = json.loads(json.dumps(head | _EMPTY | fields))
    return parse_run(run, f"the result of `bitassay {KINDS[kind].command}`")


def write_run(folder: RunFolder, **fields: Any) -> Content:
    """Write the result of a run folder to its run.json and return it; fields as in `new_run`."""
    run = new_run(folder.plan["kind"], run_id=folder.run_id, **fields)
    write_json(folder.path / "run.json", run)
    return run


def read_run(path: Path) -> Content:
    """Return the run of a folder, or of a run.json. Raises BitassayError that names the file and its
    defects."""
    file = _run_file(path)
    return parse_run(read_json(file), str(file))


def parse_run(value: object, where: str) -> Content:
    """Return a JSON value as a run of schema 2. Raises BitassayError that names `where` and the defects."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in KINDS:
        label = f"of kind {kind!r:.40}" if kind else "without a kind"
        raise BitassayError(
            f"{where}: not a run of bitassay: {type(value).__name__} {label}; known are {', '.join(KINDS)}",
            "a folder that holds run.json, such as one under runs/",
        )
    version = value.get("schema_version", value.get("schema"))
    if version not in (1, SCHEMA) or isinstance(version, bool):
        raise BitassayError(
            f"{where}: a run of kind {kind!r} in schema {version!r:.40}; "
            f"this version of bitassay reads schemas 1 and {SCHEMA}",
            f"the version of bitassay that wrote it, or `bitassay {KINDS[kind].command}` again",
        )
    try:
        check_values(value)
        run = Run.model_validate(value if version == SCHEMA else _from_schema_1(value, KINDS[kind]))
    except ValidationError as error:
        problem = defects(error, Run)
    except ValueError as error:
        problem = str(error)
    else:
        return run.model_dump()
    raise BitassayError(
        f"{where}: not a run of kind {kind!r} as this version writes it: {problem}",
        "run the same command again",
    )


def check_values(value: object, location: tuple[str, ...] = ()) -> None:
    """Raise ValueError for the first value below `value` that a run may not have."""
    problem = ""
    if isinstance(value, float) and not math.isfinite(value):
        problem = f"is {value}, not a finite number"
    elif isinstance(value, float | int) and abs(value) > MOST_NUMBER:
        problem = f"is beyond {MOST_NUMBER:g}"
    elif isinstance(value, str) and len(value) > MOST_LETTERS:
        problem = f"is longer than {MOST_LETTERS} characters"
    elif isinstance(value, dict | list):
        if len(value) > MOST_ITEMS:
            problem = f"has more than {MOST_ITEMS} entries"
        elif len(location) > MOST_DEPTH:
            problem = f"is deeper than {MOST_DEPTH} levels"
    if location and location[-1].endswith("_ci") and "intervals" not in location and not _is_interval(value):
        problem = problem or "is no interval [low, high]"
    if problem:
        raise ValueError(f"{'.'.join(location) or 'it'} {problem}")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(item, (*location, f"{key:.40}" if isinstance(key, str) else str(key)))


def _is_interval(value: object) -> bool:
    match value:
        case None:
            return True
        case [int() | float() as low, int() | float() as high]:
            return low <= high
    return False


def _from_schema_1(value: Mapping[str, Any], kind: Kind) -> Content:
    """A run of bitassay 0.1: what it had at the top level beside the fields of its kind are settings, and the
    model of the VeriLLM studies is a name."""
    run: Content = {"run_id": "", "created": "", **_EMPTY}
    run |= {key: [] for key in kind.tables.split()[1:]} | dict.fromkeys(kind.parts.split())
    run |= {key: item for key, item in value.items() if key in Run.model_fields or key in kind.names}
    settings = {key: item for key, item in value.items() if key not in run and key != "schema"}
    if isinstance(run["model"], str):
        run["model"] = {"name": run["model"]}
    environment = run.get("environment") or settings.pop("versions", None) or {}
    run |= {"schema_version": SCHEMA, "environment": environment}
    run["settings"] = settings | (value.get("settings") or {})
    if isinstance(run.get("runs"), list):  # of `studies`, which had nothing else
        parts = run["runs"] = [parse_run(part, "a part") for part in run["runs"]]
        run["rows"] = [{"kind": part["kind"]} | row for part in parts for row in part["rows"]]
        run["model"] = parts[0]["model"] if parts else {}
    return run


def _run_file(path: Path) -> Path:
    """The run.json of a folder, or a file itself. Raises BitassayError for a folder that holds none."""
    if not path.is_dir():
        return path
    if (path / "run.json").exists():
        return path / "run.json"
    if (path / "plan.json").exists():
        raise BitassayError(
            f"{path}: no run.json, so the run is not finished", "run the same command again: it goes on"
        )
    runs = sorted(file.parent.name for file in path.glob("*/run.json"))
    raise BitassayError(
        f"{path}: not a run folder, it holds no run.json",
        f"one of its folders: {', '.join(runs[:3])}" if runs else "a folder that a command wrote, see --out",
    )

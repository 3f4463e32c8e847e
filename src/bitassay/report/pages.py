"""Run folders to pages: which kinds of runs there are, and what draws each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bitassay.errors import BitassayError
from bitassay.record.files import read_json
from bitassay.report.analysis import write_analysis_report
from bitassay.report.assay import write_report
from bitassay.report.attack import write_attack_report
from bitassay.report.bench import write_bench_report, write_matmul_report
from bitassay.report.eight_bit import write_eight_bit_report
from bitassay.report.generation import write_generation_report
from bitassay.report.replication import write_replication_report
from bitassay.report.runs import (
    AnalysisRun,
    AttackRun,
    BenchRun,
    ExperimentsRun,
    GenerationRun,
    MatmulRun,
    SearchRun,
    SeparabilityRun,
    StudiesRun,
    TasksRun,
    ThresholdsRun,
)
from bitassay.report.schema import AssayRun, EightBitRun, ReplicationRun, parsed
from bitassay.report.search import write_search_report
from bitassay.report.study import write_study_report
from bitassay.report.tables import UnshownError
from bitassay.report.tasks import write_tasks_report

Run = dict[str, Any]
SCHEMA = 1


@dataclass(frozen=True)
class Kind:
    """A kind of run. command: what writes it; write: draws a page of one run, or of several where `many`."""

    command: str
    model: type[BaseModel]
    write: Callable[[Any, Path], None]
    many: bool = False


def _write_studies(runs: Sequence[Run], path: Path) -> None:
    write_study_report([part for run in runs for part in run.get("runs", [run])], path)


KINDS = {
    "assay": Kind("assay", AssayRun, write_report, many=True),
    "tasks": Kind("eval --tasks", TasksRun, write_tasks_report),
    "generation": Kind("generate", GenerationRun, write_generation_report),
    "bench": Kind("bench", BenchRun, write_bench_report),
    "matmul": Kind("bench matmul", MatmulRun, write_matmul_report),
    "attack": Kind("attack", AttackRun, write_attack_report),
    "search": Kind("search", SearchRun, write_search_report),
    "analysis": Kind("quantize --analyze", AnalysisRun, write_analysis_report),
    "eight-bit": Kind("study run task3.1", EightBitRun, write_eight_bit_report),
    "replication": Kind("study run control-table", ReplicationRun, write_replication_report),
    "studies": Kind("study run exp1", StudiesRun, _write_studies, many=True),
    "experiments": Kind("study run exp1", ExperimentsRun, _write_studies, many=True),
    "separability": Kind("study run separability", SeparabilityRun, _write_studies, many=True),
    "thresholds": Kind("calibrate --study", ThresholdsRun, _write_studies, many=True),
}


def read_run(folder: Path) -> BaseModel:
    """The run of a folder, or of a run.json. Raises BitassayError that names the file and what is wrong."""
    path = _run_file(folder)
    value = read_json(path)
    given = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(given, str) or given not in KINDS:
        seen = f"of kind {given!r:.40}" if isinstance(value, dict) and given else "without a kind"
        raise BitassayError(
            f"{path}: not a run of bitassay that has a page: {type(value).__name__} {seen}; "
            f"known are {', '.join(KINDS)}",
            "a folder that holds run.json, such as one under runs/",
        )
    schema = value.get("schema", value.get("schema_version"))
    if schema != SCHEMA or isinstance(schema, bool):
        raise BitassayError(
            f"{path}: a run of kind {given!r} in schema {schema!r:.40}; this version reads schema {SCHEMA}",
            f"the version of bitassay that wrote it, or `bitassay {KINDS[given].command}` again",
        )
    return parsed(KINDS[given].model, value, str(path))


def _run_file(folder: Path) -> Path:
    """Raises BitassayError where a folder holds none."""
    if not folder.is_dir() or (folder / "run.json").exists():
        return folder / "run.json" if folder.is_dir() else folder
    if (folder / "plan.json").exists():
        raise BitassayError(
            f"{folder}: no run.json, so the run is not finished", "run the same command again: it goes on"
        )
    runs = sorted(place.parent.name for place in folder.glob("*/run.json"))
    raise BitassayError(
        f"{folder}: not a run folder, it holds no run.json",
        f"one of its folders: {', '.join(runs[:3])}" if runs else "a folder that a command wrote, see --out",
    )


def write_pages(folders: Sequence[Path], out: Path) -> None:
    """One page of one run, or of several that share one. Raises BitassayError for what is no run, and for
    runs that have pages of their own."""
    if not folders:
        raise BitassayError("no run folder was given", "bitassay report runs/demo --out report.html")
    found = [read_run(folder).model_dump(by_alias=True) for folder in folders]
    writers = {KINDS[run["kind"]].write for run in found}
    kind = KINDS[found[0]["kind"]]
    if len(found) > 1 and (len(writers) > 1 or not kind.many):
        named = ", ".join(f"{folder} ({run['kind']})" for folder, run in zip(folders, found, strict=True))
        raise BitassayError(
            f"{len(found)} runs cannot share a page: {named}; only assays can, or studies of verifiers",
            "report them one by one",
        )
    try:
        kind.write(found if kind.many else found[0], out)
    except UnshownError as error:
        where = ", ".join(map(str, folders))
        raise BitassayError(
            f"{where}: not a run as this version writes it: {error.problem}", "run the same command again"
        ) from error

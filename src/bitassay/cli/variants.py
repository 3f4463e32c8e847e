"""What `bitassay study run` does with task3.1 to task3.3 and with the studies of replication."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import Loading


def run_variant_studies(
    studies: list[str],
    model: str | None,
    *,
    precision: str,
    devices: list[str],
    limit: int | None,
    windows: int,
    window: int | None,
    only: Sequence[str],
    jobs: int | None,
    ray: str | None,
    out: Path | None,
    loading: Loading,
    format: Format,
) -> int:
    """Each study in a run folder of its own, OUT/STUDY where there are several; a table of its variants, its
    verdicts and a page."""
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.errors import BitassayError
    from bitassay.models.options import as_device
    from bitassay.report import eight_bit, replication
    from bitassay.report.bench import shown_columns
    from bitassay.report.claims import SHORT_CLAIM_COLUMNS
    from bitassay.studies.eight_bit.run import run_eight_bit
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.eight_bit.study import eight_bit_plan, find_study
    from bitassay.studies.machines import Machine
    from bitassay.studies.parties import DTYPES
    from bitassay.studies.replication.run import run_replication
    from bitassay.studies.replication.study import STUDIES as REPLICATION

    if len(devices) > 1 or any(Machine(name).options for name in devices):
        raise BitassayError(
            f"--devices {' '.join(devices)}: one device, without numerics", "--devices cuda:0"
        )
    if precision not in DTYPES:
        raise BitassayError(f"--precision {precision} is none of {', '.join(DTYPES)}", "--precision bf16")
    if jobs is not None and jobs < 1:
        raise BitassayError(f"--jobs {jobs}: at least 1 process is needed", "--jobs 1")
    if ray is None and devices:
        as_device(devices[0])
    for name in studies:
        if name not in REPLICATION:
            find_study(name)
        elif model is None:
            raise BitassayError("no model was given", "--model smollm2-135m")
        if limit is not None and name in REPLICATION:
            raise BitassayError(f"--limit {limit}: {name} asks no questions", "--windows, or --only")
    how: dict[str, Any] = {
        "dtype": DTYPES[precision],
        "device": devices[0] if devices else "cpu",
        **loading.options,
    }
    done = []
    with show_progress() as progress:
        for name in studies:
            work: dict[str, Any] = {"jobs": jobs, "ray": ray, "progress": progress}
            work["out"] = out / name if out is not None and len(studies) > 1 else out
            if name in REPLICATION:
                assert model is not None
                protocol = Protocol(windows=windows, window_tokens=1024 if window is None else window)
                run, folder = run_replication(name, model, protocol=protocol, only=tuple(only), **how, **work)
                replication.write_replication_report(run, folder / "report.html")
                done.append((run, folder, replication.ROW_COLUMNS))
            else:
                own = EIGHT_BIT[name]
                protocol = Protocol(windows=windows, window_tokens=2048 if window is None else window)
                questions = own.questions if limit is None else limit
                plan = eight_bit_plan(name, model or own.model, questions, protocol, tuple(only), **how)
                run, folder = run_eight_bit(plan, **work)
                eight_bit.write_eight_bit_report(run, folder / "report.html")
                done.append((run, folder, eight_bit.VARIANT_COLUMNS))
    if format == "json":
        runs = [run for run, *_ in done]
        emit([], [], "json", whole={"rows": [row for run in runs for row in run["rows"]], "runs": runs})
    for run, folder, columns in done:
        if format != "json":
            emit(run["rows"], shown_columns(columns, run["rows"]), format)
        if format in ("table", "md"):
            if run.get("drafts"):
                print()
                emit(run["drafts"], replication.DRAFT_COLUMNS, format)
            print()
            emit(run["claims"], SHORT_CLAIM_COLUMNS, format)
        print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return 0

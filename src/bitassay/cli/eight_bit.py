"""What `bitassay study run task3.1 task3.2 task3.3` does: the INT8/FP8 studies."""

import sys
from pathlib import Path

from bitassay.cli.output import Format, emit


def run_eight_bit_studies(
    studies: list[str],
    model: str | None,
    *,
    precision: str,
    devices: list[str],
    limit: int | None,
    windows: int,
    window: int,
    jobs: int | None,
    ray: str | None,
    out: Path | None,
    trust_remote_code: bool,
    format: Format,
) -> int:
    """Each study in a run folder of its own, OUT/STUDY where there are several; a table of its variants, its
    verdicts and a page."""
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.errors import BitassayError
    from bitassay.report import eight_bit as report
    from bitassay.report.bench import shown_columns
    from bitassay.studies.eight_bit import STUDIES, EightBitPlan
    from bitassay.studies.eight_bit_run import run_eight_bit
    from bitassay.studies.parties import DTYPES, Machine

    if len(devices) > 1 or any(Machine(name).options for name in devices):
        raise BitassayError(
            f"--devices {' '.join(devices)}: one device, without numerics", "--devices cuda:0"
        )
    if precision not in DTYPES:
        raise BitassayError(f"--precision {precision} is none of {', '.join(DTYPES)}", "--precision bf16")
    if jobs is not None and jobs < 1:
        raise BitassayError(f"--jobs {jobs}: at least 1 process is needed", "--jobs 1")
    plans = [
        EightBitPlan(
            name,
            model or STUDIES[name].model,
            limit or STUDIES[name].questions,
            Protocol(windows=windows, window_tokens=window),
            dtype=DTYPES[precision],
            device=devices[0] if devices else "cpu",
            trust_remote_code=trust_remote_code,
        )
        for name in studies
    ]
    done = []
    with show_progress() as progress:
        for plan in plans:
            place = out / plan.study if out is not None and len(plans) > 1 else out
            run, folder = run_eight_bit(plan, out=place, jobs=jobs, ray=ray, progress=progress)
            report.write_eight_bit_report(run, folder / "report.html")
            done.append((run, folder))
    if format == "json":
        emit(
            [],
            [],
            "json",
            whole={"rows": [row for run, _ in done for row in run["rows"]], "runs": [r for r, _ in done]},
        )
    for run, folder in done:
        if format != "json":
            emit(run["rows"], shown_columns(report.VARIANT_COLUMNS, run["rows"]), format)
        if format in ("table", "md"):
            print()
            emit(run["claims"], report.SHORT_CLAIM_COLUMNS, format)
        print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return 0

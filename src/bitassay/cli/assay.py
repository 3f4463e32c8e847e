"""`bitassay assay`: the main job."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit


def assay(
    model: str,
    *,
    recipe: Annotated[list[str], Parameter(negative=())],
    windows: int = 16,
    window: int = 2048,
    dtype: str = "float32",
    prompts: int = 8,
    calibration_prompts: int = 220,
    new_tokens: int = 24,
    alpha: float = 0.01,
    repeats: int = 3,
    verify: bool = True,
    bench: bool = True,
    controls: bool = True,
    seed: int = 0,
    out: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "table",
) -> int:
    """Quantize MODEL by several recipes; one table of what each costs and whether a verifier notices.

    A recipe with replication comes with its controls, plain recipes of equal bits and of equal work, and
    whether it beats them. Writes run.json and report.html into a run folder. Interrupted, the same command
    goes on.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: A shipped recipe or a YAML file; repeat it for more rows.
        windows: How many windows of WikiText-2 to evaluate, evenly spaced.
        window: Tokens in a window.
        dtype: Arithmetic of the evaluation; timing and verification run in bfloat16.
        prompts: Traces that each recipe has to prove.
        calibration_prompts: Honest runs that the verification profile is fitted to.
        new_tokens: Tokens generated for each trace.
        alpha: How often an honest run may be accused.
        repeats: Rounds of timing.
        verify: Reach verdicts.
        bench: Time prefill and decode.
        controls: Add the controls of recipes with replication.
        seed: Of the choice of prompts and of sampling.
        out: Run folder (default: runs/assay-MODEL-ID).
        dry_run: Print the plan with an estimate of memory and time, and stop.
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.report.assay import ASSAY_COLUMNS, write_report
    from bitassay.report.bench import shown_columns
    from bitassay.report.replication import PAIR_COLUMNS
    from bitassay.studies.assay import assay
    from bitassay.studies.estimate import estimate_assay
    from bitassay.studies.verification import Verification

    options = {
        "protocol": Protocol(window_tokens=window, windows=windows),
        "controls": controls,
        "dtype": dtype,
        "seed": seed,
        "bench_repeats": repeats if bench else 0,
        "verification": Verification(prompts, calibration_prompts, new_tokens, alpha) if verify else None,
    }
    if dry_run:
        from bitassay.report.tables import Column, number, size

        columns = [
            Column("step", "step", align="left"),
            Column("work", "work", align="left"),
            Column("memory_bytes", "memory", size),
            Column("seconds", "seconds, about", number(0)),
        ]
        with show_progress() as progress:
            rows = estimate_assay(model, recipe, progress=progress, **options)
        emit(rows, columns, format)
        return 0
    with show_progress() as progress:
        run, folder = assay(
            model, recipe, out=out, progress=progress, trust_remote_code=trust_remote_code, **options
        )
    report = folder / "report.html"
    write_report(run, report)
    emit(run["rows"], ASSAY_COLUMNS, format, whole=run)
    if run["pairs"] and format == "table":
        emit(run["pairs"], shown_columns(PAIR_COLUMNS, run["pairs"]), format)
    print(f"report: {report}", file=sys.stderr)
    return 0

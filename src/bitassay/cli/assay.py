"""`bitassay assay`: the main job."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit, emit_run
from bitassay.cli.parameters import AS_IT_IS, Count, CountOrNone, Dtype, Loading, Seed, Share


def assay(
    model: str,
    *,
    recipe: Annotated[list[str], Parameter(negative=())],
    windows: Count = 16,
    window: Count = 2048,
    dtype: Dtype = "float32",
    prompts: Count = 8,
    calibration_prompts: Count = 220,
    new_tokens: Count = 24,
    alpha: Share = 0.01,
    repeats: CountOrNone = 3,
    verify: bool = True,
    bench: bool = True,
    controls: bool = True,
    seed: Seed = 0,
    out: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Quantize MODEL by several recipes; one table of what each costs and whether a verifier notices.

    A recipe with replication comes with its controls, plain recipes of equal bits and of equal work, and
    whether it beats them. Writes run.json and report.html into a run folder. Interrupted, the same command
    goes on. Exit status 1 where no verdicts could be reached.

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
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words

    check_words([model], recipe, folder=out)
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.studies.assay import assay
    from bitassay.studies.estimate import estimate_assay
    from bitassay.studies.verification import Verification

    model = loading.of(model)
    options = {
        "protocol": Protocol(window_tokens=window, windows=windows),
        "controls": controls,
        "dtype": dtype,
        "attention": loading.attention,
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
            model, recipe, out=out, progress=progress, trust_remote_code=loading.trust_remote_code, **options
        )
    emit_run(run, format, folder / "report.html")
    reason = (run["verification"] or {}).get("reason")
    return 1 if reason else 0  # the columns of verification are missing

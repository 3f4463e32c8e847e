"""`bitassay assay`: the main job."""

from typing import Any

from bitassay.cli.checks import check_words
from bitassay.cli.options import (
    Alpha,
    Compute,
    Controls,
    Count,
    CountFromZero,
    Flag,
    Model,
    Recipes,
    RunOutput,
    Seed,
    Window,
    Windows,
)
from bitassay.cli.progress import show_progress
from bitassay.report.tables import Column, number, size


def assay(
    model: Model,
    *,
    recipe: Recipes,
    windows: Windows = 16,
    window: Window = 2048,
    prompts: Count = 8,
    calibration_prompts: Count = 220,
    new_tokens: Count = 24,
    alpha: Alpha = 0.01,
    repeats: CountFromZero = 3,
    verify: bool = True,
    bench: bool = True,
    controls: Controls = True,
    seed: Seed = 0,
    dry_run: Flag = False,
    compute: Compute = Compute(),
    output: RunOutput = RunOutput(),
) -> int:
    """Quantize MODEL by several recipes; one table of what each costs and whether a verifier notices.

    Quality is measured on WikiText-2 in --dtype; timing and verification run in bfloat16. A recipe with
    replication is compared with its controls, plain recipes of equal bits and of equal work. An interrupted
    command continues when it is run again. Exit status 1 where no verdicts could be reached.

    Args:
        prompts: How many traces each recipe proves.
        calibration_prompts: How many honest runs the verification profile is fitted to.
        new_tokens: Tokens generated for each trace.
        repeats: Rounds of timing.
        verify: Reach verdicts.
        bench: Time prefill and decode.
        dry_run: Print the plan with an estimate of memory and time, and stop.
    """
    check_words([model], recipe, folder=output.out)
    from bitassay.data.windows import Protocol
    from bitassay.report.assay import ASSAY_COLUMNS
    from bitassay.report.bench import shown_columns
    from bitassay.report.replication import PAIR_COLUMNS
    from bitassay.studies.assay import assay
    from bitassay.studies.estimate import estimate_assay
    from bitassay.studies.verification import Verification

    options: dict[str, Any] = {
        "protocol": Protocol(window_tokens=window, windows=windows),
        "controls": controls,
        "dtype": compute.dtype,
        "attention": compute.attention,
        "seed": seed,
        "bench_repeats": repeats if bench else 0,
        "verification": Verification(prompts, calibration_prompts, new_tokens, alpha) if verify else None,
    }
    if dry_run:
        with show_progress() as progress:
            rows = estimate_assay(compute.of(model), recipe, progress=progress, **options)
        memory = Column("memory_bytes", "memory", size)
        output.emit((rows, ["step", "work", memory, Column("seconds", "seconds, about", number(0))]))
        return 0
    options |= {"out": output.out, "trust_remote_code": compute.trust_remote_code}
    with show_progress() as progress:
        run, folder = assay(compute.of(model), recipe, progress=progress, **options)
    pairs = run["pairs"]
    output.show_run(run, folder, (run["rows"], ASSAY_COLUMNS), (pairs, shown_columns(PAIR_COLUMNS, pairs)))
    return 1 if (run["verification"] or {}).get("reason") else 0  # the columns of verification are missing

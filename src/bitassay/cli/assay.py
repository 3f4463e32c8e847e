"""`bitassay assay`: the main job."""

from typing import Any

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.report.tables import Column, number, size


def assay(
    model: options.Model,
    *,
    recipe: options.Recipes,
    windows: options.Windows = 16,
    window: options.Window = 2048,
    prompts: options.Count = 8,
    calibration_prompts: options.Count = 220,
    new_tokens: options.Count = 24,
    alpha: options.Alpha = 0.01,
    repeats: options.CountFromZero = 3,
    verify: bool = True,
    bench: bool = True,
    controls: options.Controls = True,
    seed: options.Seed = 0,
    dry_run: options.Flag = False,
    compute: options.Bounded = options.Bounded(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Quantize MODEL by several recipes; one table of what each costs and whether a verifier notices.

    Quality is measured on WikiText-2 in --dtype; timing and verification run in bfloat16. A recipe with
    replication is compared with its controls, plain recipes of equal bits and of equal work. An interrupted
    command continues when it is run again. Models that do not fit into --memory are quantized and measured a
    layer at a time; timing and verification load them in bfloat16. Exit status 1 where no verdicts could be
    reached.

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
    from bitassay.studies.assay import assay
    from bitassay.studies.estimate import estimate_assay
    from bitassay.studies.verdicts import Verification

    settings: dict[str, Any] = {
        "protocol": Protocol(window_tokens=window, windows=windows),
        "controls": controls,
        "dtype": compute.dtype,
        "device": compute.options["device"],
        "attention": compute.attention,
        "seed": seed,
        "bench_repeats": repeats if bench else 0,
        "verification": Verification(prompts, calibration_prompts, new_tokens, alpha) if verify else None,
        "memory": compute.memory,
    }
    if dry_run:
        with show_progress() as progress:
            rows = estimate_assay(compute.of(model), recipe, progress=progress, **settings)
        memory = Column("memory_bytes", "memory", size)
        output.emit((rows, ["step", "work", memory, Column("seconds", "seconds, about", number(0))]))
        return 0
    settings |= {"out": output.out, "trust_remote_code": compute.trust_remote_code}
    with show_progress() as progress:
        run, folder = assay(compute.of(model), recipe, progress=progress, **settings)
    output.show_run(run, folder)
    return 1 if (run["verification"] or {}).get("reason") else 0  # the columns of verification are missing

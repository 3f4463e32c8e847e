"""`bitassay attack`: attacks against detectors."""

from pathlib import Path

from bitassay.cli.output import Format, emit_run
from bitassay.cli.parameters import AS_IT_IS, Count, Loading, Names, Seed, Share


def attack(
    model: str,
    *,
    attacks: Names | None = None,
    numerics: Names | None = None,
    sequences: Count = 100,
    tokens: Count = 64,
    alpha: Share = 0.01,
    batch: Count = 32,
    seed: Seed = 0,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Attack the verifier of MODEL in every known way, and say which detector catches what.

    Honest runs under several numerics set the thresholds. Writes run.json and report.html into a run folder.
    Interrupted, the same command goes on.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        attacks: Which attacks (default: all).
        numerics: Which honest numerics are pooled (default: all). Those that this machine cannot compute
            are left out by name.
        sequences: Requests that every honest host and every attacker answers.
        tokens: Tokens of an output.
        alpha: How often an honest run may be accused.
        batch: Requests generated at a time.
        seed: Of the choice of requests.
        out: Run folder (default: runs/attack-MODEL-ID).
        format: What to print on stdout; json and csv have every cell with its interval.
    """
    from bitassay.cli.checks import check_words

    check_words([model], folder=out)
    from bitassay.cli.progress import show_progress
    from bitassay.studies.attacks.study import ATTACKS, VARIANTS, AttackPlan, attack

    plan = AttackPlan(
        sequences,
        tokens,
        alpha,
        batch,
        seed,
        attention=loading.attention,
        attacks=tuple(attacks or ATTACKS),
        variants=tuple(numerics or VARIANTS),
    )
    with show_progress() as progress:
        run, folder = attack(
            loading.of(model), plan, out=out, trust_remote_code=loading.trust_remote_code, progress=progress
        )
    emit_run(run, format, folder / "report.html")
    return 0

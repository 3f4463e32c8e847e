"""`bitassay attack`: attacks against detectors."""

from bitassay.cli.checks import check_words
from bitassay.cli.options import Alpha, Count, Loading, Model, Names, RunOutput, Seed
from bitassay.cli.progress import show_progress


def attack(
    model: Model,
    *,
    attacks: Names | None = None,
    numerics: Names | None = None,
    sequences: Count = 100,
    tokens: Count = 64,
    alpha: Alpha = 0.01,
    batch: Count = 32,
    seed: Seed = 0,
    loading: Loading = Loading(),
    output: RunOutput = RunOutput(),
) -> int:
    """Attack the verifier of MODEL in every known way, and show which detector catches which attack.

    Honest runs under several numerics set the thresholds. An interrupted command continues when it is run
    again.

    Args:
        attacks: Which attacks (default: all).
        numerics: Which honest numerics are pooled (default: all). Those that this machine cannot compute are
            left out and named.
        sequences: Requests that every honest host and every attacker answers.
        tokens: Tokens of an output.
        batch: Requests generated at a time.
    """
    check_words([model], folder=output.out)
    from bitassay.report.attack import ATTACK_COLUMNS, COST_COLUMNS, matrix, matrix_columns
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
        trust = loading.trust_remote_code
        run, folder = attack(
            loading.of(model), plan, out=output.out, trust_remote_code=trust, progress=progress
        )
    tables = (matrix(run), matrix_columns(run)), (run["costs"], COST_COLUMNS)
    output.show_run(run, folder, *tables, csv=(run["rows"], ATTACK_COLUMNS))
    return 0

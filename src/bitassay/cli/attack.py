"""`bitassay attack`: attacks against detectors."""

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress


def attack(
    model: options.Model,
    *,
    attacks: options.Names | None = None,
    numerics: options.Names | None = None,
    sequences: options.Count = 100,
    tokens: options.Count = 64,
    alpha: options.Alpha = 0.01,
    batch: options.Count = 32,
    seed: options.Seed = 0,
    verifier: options.Verifiable = options.Verifiable(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Attack the verifier of MODEL in every known way, and show which detector catches which attack.

    Honest runs under several numerics (ways of computing, such as another attention kernel) set the
    thresholds. An interrupted command continues when it is run
    again.

    Args:
        attacks: Run only these attacks (default: all).
        numerics: Pool the honest runs under these numerics alone (default: all). Those that this machine
            cannot compute are left out and named.
        sequences: Requests that every honest host and every attacker answers.
        tokens: Tokens of an output.
        batch: Requests generated at a time.
    """
    check_words([model], folder=output.out)
    from bitassay.studies.attacks.study import VARIANTS, AttackPlan, attack
    from bitassay.verification.attacks.registry import ATTACKS

    plan = AttackPlan(
        sequences,
        tokens,
        alpha,
        batch,
        seed,
        attention=verifier.attention,
        dtype=verifier.dtype,
        device=verifier.options["device"],
        attacks=tuple(attacks or ATTACKS),
        variants=tuple(numerics or VARIANTS),
    )
    with show_progress() as progress:
        trust = verifier.trust_remote_code
        run, folder = attack(
            verifier.of(model), plan, out=output.out, trust_remote_code=trust, progress=progress
        )
    output.show_run(run, folder)
    return 0

"""`bitassay calibrate`: fit a verification profile, or the thresholds of an experiment, to honest runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.report.tables import Column, interval, percent, significant


def calibrate(
    model: options.Model,
    *,
    recipe: options.RecipeName | None = None,
    prompts: str = "640",
    max_new_tokens: options.Count = 32,
    alpha: options.Alpha | None = None,
    guarantee: Literal["conditional", "average"] = "conditional",
    engine: str = "transformers",
    prover_dtype: options.StateDtype | None = None,
    prover_attention: str | None = None,
    batch: options.Count = 16,
    suspects: options.Names | None = None,
    suspect_runs: options.Count = 48,
    detectors: options.Names | None = None,
    expires_days: options.Count = 90,
    key: Path | None = None,
    study: options.Names | None = None,
    trials: options.Count = 30,
    prompt_tokens: options.Count = 300,
    verifiers: options.Count = 1,
    attacks: options.Names | None = None,
    out: Path | None = None,
    machines: options.Machines = options.Machines(),
    sampling: options.Sampling = options.Sampling(),
    verifier: options.Verifiable = options.Verifiable(),
    output: options.Output = options.Output(),
) -> int:
    """Fit a verification profile for MODEL to honest runs on this machine, or the thresholds of an
    experiment.

    Thresholds are fitted to honest runs alone and scored on attacks. --alpha is 0.01 by default; with --study
    it is 0.05, since 30 trials cannot show a smaller rate. --study writes
    OUT/threshold_optimization/...yaml for `bitassay study run --rules`, with the distributions and
    report.html in the same folder. An interrupted command continues when it is run again.

    Args:
        prompts: How many of the bundled prompts, or a file of prompts.
        max_new_tokens: Tokens in an honest run. The profile decides on traces up to this length.
        guarantee: What the rate of false positives is: of this profile, with a confidence of 95 %
            (conditional), or on average over all profiles (average), which needs a third of the prompts.
        engine: Who runs the prover's MODEL: transformers, llama.cpp (a .gguf file), vllm, or a plug-in. The
            verifier computes with transformers, by --dtype, --attention and --device.
        prover_dtype: The prover's arithmetic (default: the verifier's).
        prover_attention: The prover's attention implementation (default: the verifier's).
        batch: Prompts generated at a time.
        suspects: Attacks that a verdict names where the evidence fits them, such as int8 fp8 int4 kv8: any
            attack of `bitassay attack` except those that exact checks catch.
        suspect_runs: Number of prompts on which each suspect is run; half of them measure how often it is
            named correctly.
        detectors: Detectors that decide verdicts, besides those of states and tokens that always do: any
            detector of `bitassay attack`, or of an installed plug-in.
        expires_days: How long the profile is valid.
        key: Sign the profile with the private key in this file, for other verifiers. If it does not exist, a
            key is made, readable to its owner alone.
        study: Fit the thresholds of these experiments instead: exp1 to exp5.
        trials: Honest runs in a study, and runs of each attack.
        prompt_tokens: Tokens of a study's prompt.
        verifiers: Verifiers in a study's trial.
        attacks: Provers that a study's thresholds are scored on (default: w8 fp8 w4).
        out: The file of the profile (default: in the cache folder, where `bitassay verify` finds it); with
            --study a folder (default: data).
    """
    file, folder = (None, out) if study else (out, None)
    check_words(
        [model], [recipe], folder=folder, file=file, texts=[] if prompts.isdigit() else [Path(prompts)]
    )
    if study:
        if key is not None:
            raise BitassayError("--key signs a profile, and --study makes none", "leave one of them out")
        from bitassay.cli.study import optimise
        from bitassay.studies.verillm.experiments import check_names
        from bitassay.studies.verillm.work import make_plan

        check_names(study)
        plan = make_plan(
            verifier.of(model),
            machines.devices or [],
            tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            trials=trials,
            verifiers=verifiers,
            precision=machines.precision,
            attacks=tuple(attacks or ("w8", "fp8", "w4")),
            jobs=machines.jobs or 1,
            gpus=tuple(machines.gpus or ()),
            attention=verifier.attention,
            trust_remote_code=verifier.trust_remote_code,
        )
        return optimise(study, plan, 0.05 if alpha is None else alpha, out or Path("data"), output)
    from bitassay.data.corpora import prompts_by_domain, read_prompts
    from bitassay.verification.calibrate import calibrate, check_plan, chosen_attacks, chosen_detectors
    from bitassay.verification.profile import ALPHA, signed, write_profile
    from bitassay.verification.receipts.keys import private_key, read_key

    hosted = engine != "transformers"
    if hosted and not (prover_dtype is prover_attention is suspects is None):
        raise BitassayError(
            f"--prover-dtype, --prover-attention and --suspects are of transformers, and {engine} proves",
            "leave them out",
        )
    if hosted:
        replace(verifier, attention="auto", device="auto").check_engine(engine, [recipe] if recipe else [])
    alpha = ALPHA if alpha is None else alpha
    texts, sampler = read_prompts(prompts), sampling.sampler
    check_plan(len(texts), alpha, max_new_tokens, guarantee=guarantee)
    chosen_attacks(suspects or (), sampler, min(suspect_runs, len(texts)))
    chosen_detectors(detectors or ())
    if key is not None and key.exists():
        read_key(key)
    verifier.check()  # an unknown device or attention is refused before a model is fetched
    with show_progress() as progress:
        loaded = verifier.load(model, recipe, tokens=max_new_tokens, progress=progress)
        prover = replace(
            verifier, dtype=prover_dtype or verifier.dtype, attention=prover_attention or verifier.attention
        )
        same = not hosted and prover_dtype is None and prover_attention is None
        profile = calibrate(
            loaded if same else prover.load(model, recipe, engine=engine, progress=progress),
            loaded,
            texts,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            alpha=alpha,
            guarantee=guarantee,
            batch_size=batch,
            expires_days=expires_days,
            seed=sampling.seed,
            suspects=suspects or (),
            detectors=detectors or (),
            suspect_runs=suspect_runs,
            domains=prompts_by_domain(),
            progress=progress,
        )
    if key is not None:
        profile = signed(profile, private_key(key))
    row = {
        "profile": str(write_profile(profile, out)),
        "signed_by": profile.signature.key if profile.signature else None,
        "model": profile.model.name,
        "recipe_id": profile.model.recipe_id,
        "alpha": profile.alpha,
        "guarantee": profile.guarantee,
        "n_calibration": profile.n,
        "n_held_out": profile.held_out.n,
        "false_positive_rate": profile.held_out.false_positive_rate,
        "false_positive_interval": list(profile.held_out.interval),
        "unseen_domains_rate": profile.left_out and profile.left_out.false_positive_rate,
        "unseen_domains_interval": profile.left_out and list(profile.left_out.interval),
        "tokens": [position + 1 for position in profile.generated_positions],
        "expires": profile.expires.isoformat(),
    }
    confusion: list[dict[str, Any]] = []
    columns = [Column("kind", "held-out runs of", align="left")]
    if library := profile.library:
        from bitassay.verification.attribution import NONE

        confusion = [{"kind": kind, **called} for kind, called in library.confusion.items()]
        columns += [Column(name, f"called\n{name}") for name in (*library.kinds, NONE)]
    by = (Column("signed_by", "signed by", align="left"),) if profile.signature else ()
    output.emit(([row], (*COLUMNS, *by)), (confusion, columns), json={"rows": [row], "confusion": confusion})
    return 0


COLUMNS = (
    Column("model", "model", align="left"),
    Column("alpha", "alpha", significant(2)),
    Column("guarantee", "guarantee", align="left"),
    Column("n_calibration", "honest\nscores"),
    Column("n_held_out", "held out"),
    Column("false_positive_rate", "refused", percent(1)),
    Column("false_positive_interval", "95 % interval", interval(percent(1))),
    Column("unseen_domains_rate", "refused of\nunseen domains", percent(1)),
    Column("unseen_domains_interval", "95 % interval", interval(percent(1))),
    Column("tokens", "output tokens", lambda pair: f"{pair[0]}-{pair[1]}"),
    Column("expires", "expires", lambda text: text[:10]),
    Column("profile", "profile", align="left"),
)

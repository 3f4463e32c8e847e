"""`bitassay calibrate`: fit a verification profile, or the thresholds of an experiment, to honest runs."""

from pathlib import Path
from typing import Any

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import (
    AS_IT_IS,
    Count,
    Device,
    Loading,
    Names,
    Numbers,
    Precision,
    Seed,
    Share,
    StateDtype,
)


def calibrate(
    model: str,
    *,
    recipe: str | None = None,
    prompts: str = "240",
    max_new_tokens: Count = 32,
    alpha: Share | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Seed = 0,
    prover_dtype: StateDtype | None = None,
    prover_attention: str | None = None,
    dtype: StateDtype = "bfloat16",
    device: Device = "cpu",
    batch: Count = 16,
    suspects: Names | None = None,
    suspect_runs: Count = 48,
    expires_days: Count = 90,
    study: Names | None = None,
    trials: Count = 30,
    prompt_tokens: Count = 300,
    verifiers: Count = 1,
    devices: Names | None = None,
    precision: Precision | None = None,
    attacks: Names | None = None,
    jobs: Count = 1,
    gpus: Numbers | None = None,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Fit a verification profile for MODEL to honest runs on this machine, or an experiment's thresholds.

    With --study it writes OUT/threshold_optimization/...yaml, for `bitassay study run --rules`, beside it the
    distributions and report.html. Fitted on honest runs alone, scored on attacks. Interrupted, the same
    goes on.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: Calibrate MODEL quantized by this recipe, as both sides run it.
        prompts: How many of the bundled prompts, or a file of prompts.
        max_new_tokens: Tokens in an honest run. The profile decides on traces up to this length.
        alpha: How often an honest run may be accused (default: 0.01; with --study 0.05, the least that 30
            trials can show).
        temperature: 0 takes the most likely token.
        top_p: Sample from the most likely tokens that have this probability together.
        seed: Of the sampling, and of the order of the prompts.
        prover_dtype: The prover's arithmetic (default: the verifier's).
        prover_attention: The prover's attention implementation (default: the verifier's).
        dtype: The verifier's arithmetic.
        device: Where to run: cpu, cuda, mps.
        batch: Prompts generated at a time.
        suspects: Attacks that verdicts are to name where the evidence fits them, such as int8 fp8 int4 kv8:
            any that `bitassay attack` has, but for those that exact checks catch.
        suspect_runs: On how many of the prompts each suspect is run, half of them to measure how often it
            is named rightly.
        expires_days: How long the profile is valid.
        study: Fit the thresholds of these experiments instead: exp1 to exp5.
        trials: Honest runs in a study, and runs of each attack.
        prompt_tokens: Tokens of a study's prompt.
        verifiers: Verifiers in a study's trial.
        devices: As in `bitassay study run`.
        precision: Of the dense model in a study, as in `bitassay study run`.
        attacks: Provers that a study's thresholds are scored on (default: w8 fp8 w4).
        jobs: A study's processes at a time.
        gpus: Which GPUs a study's processes are dealt to.
        out: The profile's file (default: the cache folder, where `bitassay verify` finds it); with --study a
            folder (default: data).
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words

    check_words(
        [model],
        None if recipe is None else [recipe],
        folder=out if study else None,
        file=None if study else out,
        texts=[] if prompts.isdigit() else [Path(prompts)],
    )
    if study:
        from bitassay.cli.study import make_plan, optimise
        from bitassay.studies.verillm.experiments import check_names

        check_names(study)
        plan = make_plan(
            model,
            devices or [],
            tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            trials=trials,
            verifiers=verifiers,
            precision=precision,
            attacks=tuple(attacks or ("w8", "fp8", "w4")),
            jobs=jobs,
            gpus=tuple(gpus or ()),
            **loading.options,
        )
        return optimise(study, plan, 0.05 if alpha is None else alpha, out or Path("data"), format)
    from bitassay.cli.progress import show_progress
    from bitassay.engines.load import load
    from bitassay.engines.sampling import Sampler
    from bitassay.models.options import as_device
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.verification.calibrate import calibrate, check_plan, chosen_attacks
    from bitassay.verification.profile import ALPHA, write_profile

    alpha = ALPHA if alpha is None else alpha
    texts = _prompts(prompts)
    sampler = Sampler(temperature, top_p, seed)
    check_plan(len(texts), alpha, max_new_tokens)
    chosen_attacks(suspects or (), sampler, min(suspect_runs, len(texts)))
    as_device(device)
    with show_progress() as progress:
        name = loading.of(model)
        where: dict[str, Any] = {"device": device, "progress": progress}
        wanted, trust = [find_recipe(recipe)] if recipe else [], loading.trust_remote_code
        check_fit(name, wanted, tokens=max_new_tokens, trust_remote_code=trust, progress=progress)
        verifier = load(name, dtype=dtype, **where, **loading.options)
        prover = verifier
        if prover_dtype or prover_attention:
            changed = {"attention": prover_attention} if prover_attention else {}
            own: dict[str, Any] = loading.options | changed
            prover = load(name, dtype=prover_dtype or dtype, **where, **own)
        if recipe:
            from bitassay.quantization.pipeline import quantize_once

            same = prover is verifier
            verifier = quantize_once(verifier, recipe, progress=progress)
            prover = verifier if same else quantize_once(prover, recipe, progress=progress)
        profile = calibrate(
            prover,
            verifier,
            texts,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            alpha=alpha,
            batch_size=batch,
            expires_days=expires_days,
            seed=seed,
            suspects=suspects or (),
            suspect_runs=suspect_runs,
            progress=progress,
        )
    path = write_profile(profile, out)
    row = {
        "profile": str(path),
        "model": profile.model.name,
        "recipe_id": profile.model.recipe_id,
        "alpha": profile.alpha,
        "n_calibration": profile.n,
        "n_held_out": profile.held_out.n,
        "false_positive_rate": profile.held_out.false_positive_rate,
        "false_positive_interval": list(profile.held_out.interval),
        "tokens": [position + 1 for position in profile.generated_positions],
        "expires": profile.expires.isoformat(),
    }
    library = profile.library
    confusion = [{"kind": kind, **called} for kind, called in library.confusion.items()] if library else []
    emit([row], _columns(), format, whole={"rows": [row], "confusion": confusion})
    if library and format in ("table", "md"):
        print()
        emit(confusion, _confusion_columns(list(library.kinds)), format)
    return 0


def _prompts(given: str) -> list[str]:
    from bitassay.data.corpora import bundled_prompts, prompts_from
    from bitassay.errors import BitassayError

    if not given.isdigit():
        return prompts_from(Path(given))
    bundled = bundled_prompts()
    if not 0 < int(given) <= len(bundled):
        raise BitassayError(
            f"--prompts {given}: the package has {len(bundled)}", f"1 to {len(bundled)}, or a file of prompts"
        )
    return [bundled[index * len(bundled) // int(given)] for index in range(int(given))]


def _confusion_columns(kinds: list[str]) -> list[Any]:
    from bitassay.report.tables import Column
    from bitassay.verification.attribution import NONE

    first = Column("kind", "held-out runs of", align="left")
    return [first, *(Column(name, f"called\n{name}") for name in (*kinds, NONE))]


def _columns() -> list[Any]:
    from bitassay.report.tables import Column, interval, percent, significant

    return [
        Column("model", "model", align="left"),
        Column("alpha", "alpha", significant(2)),
        Column("n_calibration", "honest\nscores"),
        Column("n_held_out", "held out"),
        Column("false_positive_rate", "refused", percent(1)),
        Column("false_positive_interval", "95 % interval", interval(percent(1))),
        Column("tokens", "output tokens", lambda pair: f"{pair[0]}-{pair[1]}"),
        Column("expires", "expires", lambda text: text[:10]),
        Column("profile", "profile", align="left"),
    ]

"""Fit a verification profile to honest runs: `calibrate`.

The prompts are shuffled and each makes one honest trace, which the verifier checks. A quarter of them gives
mean and standard deviation of the statistics, half gives the honest scores that p-values count, and the last
quarter, which neither has seen, measures the false-positive rate that comes of it. Cut after n positions, a
run is an honest run of a shorter request, so one run of each prompt gives all lengths.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError, at_least, suggestion
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.models.identity import identity
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.attacks.hosts import TRACE_ATTACKS, Attack, Setting
from bitassay.verification.attribution import HONEST, Library, fit_library
from bitassay.verification.evidence import Evidence, gather
from bitassay.verification.numerics import numerics
from bitassay.verification.profile import (
    ALPHA,
    Fit,
    HeldOut,
    Profile,
    evidence_score,
    runs_needed,
    statistics,
    token_statistic,
)
from bitassay.verification.prove import BATCH, prove_many
from bitassay.verification.structure import shape_defects
from bitassay.verification.trace import ModelClaim, Sampling, Trace

MIN_POSITIONS = 8
MIN_FIT = 8
SUSPECT_RUNS = 48
CHUNK = 4 * BATCH  # traces that exist at a time; prompts are batched by length within it
# A spread below these is too small to be told from that of a few runs: 2 % of a distance, a tenth of the
# margin and its offset.
STATES_SD, TOKENS_SD = 0.02, 0.1


def calibrate(
    prover_model: PreTrainedModel,
    verifier_model: PreTrainedModel,
    prompts: Sequence[str | TokenIds],
    *,
    max_new_tokens: int = 32,
    sampler: Sampler = GREEDY,
    alpha: float = ALPHA,
    batch_size: int = BATCH,
    min_positions: int = MIN_POSITIONS,
    expires_days: int = 90,
    seed: int = 0,
    suspects: Sequence[str] = (),
    suspect_runs: int = SUSPECT_RUNS,
    progress: Progress = silent,
) -> Profile:
    """A profile from one honest run of `prover_model` for each prompt, checked by `verifier_model` (they may
    be the same object).

    Runs with fewer than `min_positions` generated positions are left out, in calibration as in verification.
    suspects: attacks (`attacks.TRACE_ATTACKS`) that verdicts are to name, each run on `suspect_runs` of the
    prompts. Raises BitassayError where the two are not the same model, or where too few runs are left for
    `alpha` or of a suspect; it says how many are needed.
    """
    claim = ModelClaim.of(identity(verifier_model))
    if not ModelClaim.of(identity(prover_model)).is_same_model(claim):
        raise BitassayError(
            "prover and verifier are not the same model",
            "calibrate with honest runs: the same weights, configuration and recipe on both sides",
        )
    check_plan(len(prompts), alpha, max_new_tokens, min_positions)
    at_least(1, batch=batch_size, expires_days=expires_days)
    attacks = chosen_attacks(suspects, sampler, min(suspect_runs, len(prompts)))
    shuffled = [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "batch_size": batch_size,
        "progress": progress,
    }
    suspected = suspect_evidence(
        prover_model, verifier_model, shuffled[:suspect_runs], attacks, min_positions, **options
    )
    evidence = honest_evidence(prover_model, verifier_model, shuffled, **options)
    evidence = [one for one in evidence if one.n_generated >= min_positions]
    check_enough(
        len(evidence), alpha, f" with {min_positions} or more generated positions, of {len(prompts)} prompts"
    )
    fit, conformal, held_out = split(evidence)
    layers, tokens = fit_by_length(fit, min_positions)
    created = datetime.now(UTC).replace(microsecond=0)
    profile = Profile(
        model=claim,
        prover=numerics(prover_model),
        verifier=numerics(verifier_model),
        sampling=Sampling.of(sampler, max_new_tokens),
        layers=layers,
        tokens=tokens,
        scores=tuple(scores_by_length(one, layers, tokens, min_positions) for one in conformal),
        held_out=HeldOut(n=len(held_out), rejected=0, interval=(0.0, 1.0)),
        alpha=alpha,
        generated_positions=(min_positions, max(min_positions, max_new_tokens - 1)),
        prompts_digest=digest_json([list(encode_prompt(verifier_model, prompt)) for prompt in prompts]),
        created=created,
        expires=created + timedelta(days=expires_days),
        library=suspects_library(fit, held_out, suspected, layers, tokens, alpha) if suspected else None,
    )
    return profile.model_copy(update={"held_out": measure(profile, held_out)})


def honest_evidence(
    prover_model: PreTrainedModel,
    verifier_model: PreTrainedModel,
    prompts: Sequence[str | TokenIds],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    progress: Progress = silent,
) -> list[Evidence]:
    """The evidence of one honest run for each prompt; only CHUNK traces exist at a time."""
    evidence: list[Evidence] = []
    for start in range(0, len(prompts), CHUNK):
        progress("honest runs", start, len(prompts))
        chunk = prompts[start : start + CHUNK]
        traces = prove_many(
            prover_model,
            chunk,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            nonces=[f"calibrate-{start + index}" for index in range(len(chunk))],
            batch_size=batch_size,
        )
        evidence += gather(traces, verifier_model, verillm=False)
    progress("honest runs", len(prompts), len(prompts))
    return evidence


def split(evidence: Sequence[Evidence]) -> tuple[list[Evidence], list[Evidence], list[Evidence]]:
    """Fit (a quarter), conformal (half) and held-out (a quarter) parts, in the order given."""
    quarter = len(evidence) // 4
    return (
        list(evidence[:quarter]),
        list(evidence[quarter : len(evidence) - quarter]),
        list(evidence[len(evidence) - quarter :]),
    )


def fit_by_length(evidence: Sequence[Evidence], shortest: int) -> tuple[dict[int, Fit], Fit]:
    """Mean and standard deviation of each layer's mean log distance and of the token statistic, over the runs
    cut at several lengths."""
    lengths = fit_lengths([one.n_generated for one in evidence], shortest)
    cut = [[one.prefix(n) for one in evidence if one.n_generated >= n] for n in lengths]
    layers = {
        one.layer: fit_values(lengths, [[_distance(run, index) for run in runs] for runs in cut], STATES_SD)
        for index, one in enumerate(evidence[0].layers)
    }
    return layers, fit_values(lengths, [[token_statistic(run) for run in runs] for runs in cut], TOKENS_SD)


def _distance(run: Evidence, index: int) -> float:
    """The mean log distance of a run that has generated positions, at one of its layers."""
    found = run.layers[index].generated
    assert found is not None
    return found


def fit_lengths(reached: Sequence[int], shortest: int) -> list[int]:
    """`shortest`, then a factor of sqrt(2) apart up to what at least MIN_FIT of the runs have `reached`."""
    longest = sorted(reached)[-MIN_FIT]
    steps = math.ceil(2 * math.log2(longest / shortest))
    return sorted({*(round(shortest * 2 ** (step / 2)) for step in range(steps)), longest})


def fit_values(lengths: Sequence[int], values: Sequence[Sequence[float]], smallest_sd: float) -> Fit:
    """values: those of all runs at each of the lengths."""
    return Fit(
        lengths=tuple(lengths),
        mean=tuple(float(np.mean(runs)) for runs in values),
        sd=tuple(max(float(np.std(runs, ddof=1)), smallest_sd) for runs in values),
    )


def scores_by_length(
    evidence: Evidence, layers: Mapping[int, Fit], tokens: Fit, shortest: int
) -> tuple[float, ...]:
    """The scores of one run cut at `shortest` generated positions, at one more, ..., and not cut."""
    return tuple(
        evidence_score(evidence.prefix(n), layers, tokens).value
        for n in range(shortest, evidence.n_generated + 1)
    )


def measure(profile: Profile, held_out: Sequence[Evidence]) -> HeldOut:
    """How many of the held-out honest runs the profile refuses at its alpha."""
    limit = profile.generated_positions[1]
    rejected = sum(profile.p_value(profile.score(one).value, limit) <= profile.alpha for one in held_out)
    interval = clopper_pearson_interval(rejected, len(held_out))
    return HeldOut(n=len(held_out), rejected=rejected, interval=interval)


def chosen_attacks(names: Sequence[str], sampler: Sampler, runs: int) -> list[Attack]:
    """The attacks that statistics could tell apart, by name; BitassayError for any other."""
    for name in names:
        if name not in TRACE_ATTACKS:
            raise BitassayError(
                f"--suspects {name}: no such attack; {suggestion(name, TRACE_ATTACKS)}",
                f"any of {', '.join(name for name, one in TRACE_ATTACKS.items() if not one.structural)}",
            )
        if TRACE_ATTACKS[name].structural:
            raise BitassayError(
                f"--suspects {name}: exact checks catch it, whatever its statistics", "leave it out"
            )
        if TRACE_ATTACKS[name].sampled and sampler == GREEDY:
            raise BitassayError(
                f"--suspects {name}: greedy runs do not tell it from honest ones", "--temperature 1"
            )
    if names and runs < 2 * MIN_FIT:
        raise BitassayError(
            f"{runs} runs of each suspect are too few", f"--suspect-runs {2 * MIN_FIT} or more"
        )
    return [TRACE_ATTACKS[name] for name in dict.fromkeys(names)]


def suspect_evidence(
    prover_model: PreTrainedModel,
    verifier_model: PreTrainedModel,
    prompts: Sequence[str | TokenIds],
    attacks: Sequence[Attack],
    min_positions: int,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    progress: Progress = silent,
) -> dict[str, list[Evidence]]:
    """By name, the evidence of the runs of each attack that are long enough. Raises BitassayError where those
    are too few."""
    if not attacks:
        return {}
    honest = prove_many(
        prover_model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        nonces=[f"suspect-{index}" for index in range(len(prompts))],
        batch_size=batch_size,
    )
    setting, found = Setting(prover_model, honest, batch_size), {}
    for done, attack in enumerate(attacks):
        progress("suspects", done, len(attacks))
        traces = [one for one in attack.run(setting) if isinstance(one, Trace)]
        sound = [trace for trace in traces if not shape_defects(trace, verifier_model)]
        evidence = gather(sound, verifier_model, verillm=False)
        found[attack.name] = [one for one in evidence if one.n_generated >= min_positions]
        if (count := len(found[attack.name])) < 2 * MIN_FIT:
            raise BitassayError(
                f"{count} of {len(prompts)} runs of {attack.name} have {min_positions} or more generated "
                f"positions; {2 * MIN_FIT} are needed",
                "a larger --suspect-runs, longer outputs, or leave it out of --suspects",
            )
    progress("suspects", len(attacks), len(attacks))
    return found


def suspects_library(
    fit: Sequence[Evidence],
    held_out: Sequence[Evidence],
    suspects: Mapping[str, Sequence[Evidence]],
    layers: Mapping[int, Fit],
    tokens: Fit,
    alpha: float,
) -> Library:
    """Of honest runs (those of the fit, and those held out) and of suspects, every other one held out; at
    lengths that MIN_FIT runs of each reach, in both halves."""
    fitted = {HONEST: fit} | {name: runs[::2] for name, runs in suspects.items()}
    unseen = {HONEST: held_out} | {name: runs[1::2] for name, runs in suspects.items()}
    longest = min(
        sorted(one.n_generated for one in runs)[-MIN_FIT]
        for kinds in (fitted, unseen)
        for runs in kinds.values()
    )
    lengths = [n for n in tokens.lengths if n <= longest]

    def at_lengths(runs: Sequence[Evidence]) -> dict[int, np.ndarray]:
        return {
            n: np.array([statistics(one.prefix(n), layers, tokens) for one in runs if one.n_generated >= n])
            for n in lengths
        }

    return fit_library(
        {name: at_lengths(runs) for name, runs in fitted.items()},
        {name: at_lengths(runs) for name, runs in unseen.items()},
        alpha,
    )


def check_plan(runs: int, alpha: float, max_new_tokens: int, min_positions: int = MIN_POSITIONS) -> None:
    """Refuse what no profile can come of, whatever the model: too few runs for `alpha`, or too short ones.
    The last token of a run has no position of its own."""
    check_enough(runs, alpha)
    if max_new_tokens <= min_positions:
        raise BitassayError(
            f"runs of {max_new_tokens} tokens have {max(max_new_tokens - 1, 0)} generated positions, "
            f"and a profile is fitted to runs with {min_positions} or more generated positions",
            f"ask for {min_positions + 1} tokens or more",
        )


def check_enough(runs: int, alpha: float, of_which: str = "") -> None:
    """Refuse fewer runs than give a p-value of `alpha` and a usable fit."""
    if not 0 < alpha < 1:
        raise BitassayError(f"alpha {alpha} is not between 0 and 1", "--alpha 0.05")
    needed = max(2 * runs_needed(alpha), 4 * MIN_FIT)
    if runs < needed:
        raise BitassayError(
            f"{runs} honest runs{of_which} are too few for alpha {alpha:g}, which needs {needed}",
            f"calibrate with {needed} prompts or more, longer outputs, or a larger alpha",
        )

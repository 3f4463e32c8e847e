"""Fit a verification profile to honest runs: `calibrate`.

The prompts are shuffled and each makes one honest trace, which the verifier checks. A fifth of them gives
mean and standard deviation of the statistics, three fifths give the honest scores that p-values count, and
the last fifth, which neither has seen, measures the false-positive rate that comes of it. Cut after n
positions, a run is an honest run of a shorter request, so one run of each prompt gives all lengths. A prompt
counts once, and those that do not fit the model's context are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.engine import TRANSFORMERS, engine_name
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError, at_least, suggestion
from bitassay.models.identity import identity
from bitassay.models.positions import context_length
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.attacks.attack import Attack, Setting
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.attribution import HONEST, Library, fit_library
from bitassay.verification.detectors.excess_distance import ROUNDING
from bitassay.verification.detectors.registry import DECIDING, DETECTORS, STATES
from bitassay.verification.fitting import MIN_FIT, fit_by_length, split
from bitassay.verification.left_out import by_others
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import Observation, check_verifier, observe
from bitassay.verification.profile import ALPHA, HeldOut, Profile, library_statistics, unlike
from bitassay.verification.prove import BATCH, prove_many
from bitassay.verification.scores import Fit, Fits, Guarantee, runs_needed, score, statistics
from bitassay.verification.structure import Request
from bitassay.verification.submissions import Submission
from bitassay.verification.trace import ModelClaim, Sampling, Trace

MIN_POSITIONS = 8
SUSPECT_RUNS = 48
CHUNK = 4 * BATCH  # traces that exist at a time; prompts are batched by length within it


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
    guarantee: Guarantee = "conditional",
    seed: int = 0,
    suspects: Sequence[str] = (),
    suspect_runs: int = SUSPECT_RUNS,
    detectors: Sequence[str] = (),
    domains: Mapping[str, Sequence[str]] | None = None,
    progress: Progress = silent,
) -> Profile:
    """Return a profile from one honest run of `prover_model` for each prompt, checked by `verifier_model`
    (they may be the same object).

    Runs with fewer than `min_positions` generated positions are left out, in calibration as in verification.
    suspects: attacks that verdicts are to name, each run on `suspect_runs` of the prompts. detectors: those
    that decide besides those of `DECIDING`. guarantee: "conditional", the rate of false positives of this
    profile is at most alpha with a confidence of 95 %; or "average", over all profiles it is (`scores.py`),
    which needs a third of the runs. domains: texts of prompts by domain, of
    which each is left out once, to measure how many runs of unseen domains are refused. Raises BitassayError
    where the two are not the same model, or where too few runs are left for `alpha` or of a suspect; it says
    how many are needed.
    """
    claim = ModelClaim.of(identity(verifier_model))
    if not ModelClaim.of(identity(prover_model)).is_same_model(claim):
        raise BitassayError(
            "prover and verifier are not the same model",
            "calibrate with honest runs: the same weights, configuration and recipe on both sides",
        )
    check_verifier(verifier_model)
    if suspects and (name := engine_name(prover_model)) != TRANSFORMERS:
        raise BitassayError(f"suspects change a model of transformers, and {name} proves", "leave them out")
    given, prompts = len(prompts), fitting(prompts, verifier_model, max_new_tokens)
    left_out = f" (of {given} prompts; repeated and too long ones are left out)" * (len(prompts) < given)
    check_plan(len(prompts), alpha, max_new_tokens, min_positions, guarantee, left_out)
    at_least(1, batch=batch_size, expires_days=expires_days)
    attacks = chosen_attacks(suspects, sampler, min(suspect_runs, len(prompts)))
    names = (*DECIDING, ROUNDING.name, *chosen_detectors(detectors))
    shuffled = [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]

    def answer(chosen: Sequence[str | TokenIds], nonces: Sequence[str]) -> list[Trace]:
        return prove_many(
            prover_model,
            chosen,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            nonces=nonces,
            batch_size=batch_size,
        )

    def observed(submissions: Sequence[Submission]) -> list[Observation]:
        return observe(submissions, verifier_model, [Request()] * len(submissions), names)

    def long_enough(submissions: Sequence[Submission]) -> list[Observation]:
        return [run for run in observed(submissions) if run.positions >= min_positions]

    suspected = suspect_runs_of(
        attacks, Setting(prover_model, [], batch_size), shuffled[:suspect_runs], answer, long_enough, progress
    )
    domain_of = {
        encode_prompt(verifier_model, text): name for name, texts in (domains or {}).items() for text in texts
    }
    honest: list[Observation] = []
    by_domain: dict[str, list[Observation]] = {}
    for start in range(0, len(shuffled), CHUNK):
        progress("honest runs", start, len(shuffled))
        chunk = shuffled[start : start + CHUNK]
        nonces = [f"calibrate-{index}" for index in range(start, start + len(chunk))]
        for ids, run in zip(chunk, observed(answer(chunk, nonces)), strict=True):
            if run.positions >= min_positions:
                honest.append(run)
                by_domain.setdefault(domain_of.get(ids, ""), []).append(run)
    progress("honest runs", len(shuffled), len(shuffled))
    of_which = f" with {min_positions} or more generated positions, of {len(prompts)} prompts"
    check_enough(len(honest), alpha, guarantee, of_which)
    fitted, conformal, held_out = split(honest)
    fits = dict(fit_by_length(fitted, names, min_positions))
    control = fits.pop(ROUNDING.name)
    created = datetime.now(UTC).replace(microsecond=0)
    progress("leaving out each domain of text")
    unseen = by_others(
        by_domain, by_domain, list(fits), shortest=min_positions, alpha=alpha, guarantee=guarantee, seed=seed
    )
    refusals = {name: judged.refused(alpha) for name, judged in unseen.items()}
    profile = Profile(
        model=claim,
        prover=numerics(prover_model),
        verifier=numerics(verifier_model),
        sampling=Sampling.of(sampler, max_new_tokens),
        layers=honest[0].layers,
        detectors=fits,
        control=control,
        scores=tuple(scores_by_length(run, fits, min_positions) for run in conformal),
        unlike=tuple(
            tuple(unlike(run, control, n) for n in range(min_positions, run.positions + 1))
            for run in conformal
        ),
        held_out=HeldOut.of(0, len(held_out)),
        left_out=HeldOut.of(sum(refusals.values()), sum(len(by_domain[name]) for name in refusals))
        if refusals
        else None,
        alpha=alpha,
        guarantee=guarantee,
        generated_positions=(min_positions, max(min_positions, max_new_tokens - 1)),
        prompts_digest=digest_json([list(ids) for ids in prompts]),
        created=created,
        expires=created + timedelta(days=expires_days),
        library=suspects_library(fitted, held_out, suspected, fits, alpha) if suspected else None,
    )
    return profile.model_copy(update={"held_out": measure(profile, held_out)})


def scores_by_length(run: Observation, fits: Fits, shortest: int) -> tuple[float, ...]:
    """Return the scores of one run cut at `shortest` generated positions, at one more, ..., and not cut."""
    return tuple(
        score(statistics(run, list(fits), n, n + 1), fits, n) for n in range(shortest, run.positions + 1)
    )


def measure(profile: Profile, held_out: Sequence[Observation]) -> HeldOut:
    """Return how many of the held-out honest runs the profile refuses at its alpha."""
    limit = profile.generated_positions[1]
    scores = [profile.ranked(profile.score(run).value, limit, run.positions) for run in held_out]
    rejected = sum(profile.refusal(score, limit) <= profile.alpha for score in scores)
    return HeldOut.of(rejected, len(held_out))


def chosen_detectors(names: Sequence[str]) -> list[str]:
    """Return the detectors that decide besides the usual ones. Raises BitassayError for an unknown one, for
    exact checks, which always decide, and for the control, which says nothing about a host."""
    chosen = [name for name in dict.fromkeys(names) if name not in DECIDING]
    if exact := [name for name in chosen if DETECTORS[name].exact]:
        raise BitassayError(f"--detectors {exact[0]}: exact checks always decide", "leave it out")
    if ROUNDING.name in chosen:
        raise BitassayError(
            f"--detectors {ROUNDING.name}: it sees the verifier's own states alone", "leave it out"
        )
    return chosen


def chosen_attacks(names: Sequence[str], sampler: Sampler, runs: int) -> list[Attack]:
    """Return the attacks that statistics could tell apart, by name. Raises BitassayError for any other."""
    for name in names:
        if name not in ATTACKS:
            usable = ", ".join(name for name, attack in ATTACKS.items() if not attack.structural)
            raise BitassayError(
                f"--suspects {name}: no such attack; {suggestion(name, ATTACKS)}", f"any of {usable}"
            )
        if ATTACKS[name].structural:
            raise BitassayError(
                f"--suspects {name}: exact checks catch it, whatever its statistics", "leave it out"
            )
        if ATTACKS[name].sampled and sampler == GREEDY:
            raise BitassayError(
                f"--suspects {name}: greedy runs do not tell it from honest ones", "--temperature 1"
            )
    if names and runs < 2 * MIN_FIT:
        raise BitassayError(
            f"{runs} runs of each suspect are too few", f"--suspect-runs {2 * MIN_FIT} or more"
        )
    return [ATTACKS[name] for name in dict.fromkeys(names)]


def suspect_runs_of(
    attacks: Sequence[Attack],
    setting: Setting,
    prompts: Sequence[str | TokenIds],
    answer: Callable[[Sequence[str | TokenIds], Sequence[str]], list[Trace]],
    long_enough: Callable[[Sequence[Submission]], list[Observation]],
    progress: Progress,
) -> dict[str, list[Observation]]:
    """Return by name the runs of each attack that are long enough. Raises BitassayError where those are too
    few."""
    if not attacks:
        return {}
    setting = replace(setting, honest=answer(prompts, [f"suspect-{index}" for index in range(len(prompts))]))
    suspected = {}
    for done, attack in enumerate(attacks):
        progress("suspects", done, len(attacks))
        suspected[attack.name] = long_enough(attack.run(setting))
        if (count := len(suspected[attack.name])) < 2 * MIN_FIT:
            raise BitassayError(
                f"{count} of {len(prompts)} runs of {attack.name} are long enough to be judged; "
                f"{2 * MIN_FIT} are needed",
                "a larger --suspect-runs, longer outputs, or leave it out of --suspects",
            )
    progress("suspects", len(attacks), len(attacks))
    return suspected


def suspects_library(
    fitted: Sequence[Observation],
    held_out: Sequence[Observation],
    suspects: Mapping[str, Sequence[Observation]],
    fits: Mapping[str, tuple[Fit, ...]],
    alpha: float,
) -> Library:
    """Return a library of honest runs (those of the fit, and those held out) and of suspects, every other one
    held out; at lengths that MIN_FIT runs of each reach, in both halves."""
    seen = {HONEST: fitted} | {name: runs[::2] for name, runs in suspects.items()}
    unseen = {HONEST: held_out} | {name: runs[1::2] for name, runs in suspects.items()}
    every = [*seen.values(), *unseen.values()]
    longest = min(sorted(run.positions for run in runs)[-MIN_FIT] for runs in every)
    lengths = [n for n in fits[STATES][0].lengths if n <= longest]

    def at_lengths(kinds: Mapping[str, Sequence[Observation]]) -> dict[str, dict[int, np.ndarray]]:
        return {
            name: {
                n: np.array([library_statistics(run, fits, n) for run in runs if run.positions >= n])
                for n in lengths
            }
            for name, runs in kinds.items()
        }

    return fit_library(at_lengths(seen), at_lengths(unseen), alpha)


def fitting(prompts: Sequence[str | TokenIds], model: PreTrainedModel, max_new_tokens: int) -> list[TokenIds]:
    """Return the token ids of the prompts that fit the model's context with their output, each once."""
    limit = context_length(model)
    encoded = dict.fromkeys(encode_prompt(model, prompt) for prompt in prompts)
    return [ids for ids in encoded if limit is None or len(ids) + max_new_tokens - 1 <= limit]


def check_plan(
    runs: int,
    alpha: float,
    max_new_tokens: int,
    min_positions: int = MIN_POSITIONS,
    guarantee: Guarantee = "conditional",
    of_which: str = "",
) -> None:
    """Raise BitassayError for what no profile can come of, whatever the model: too few runs for `alpha`, or
    too short ones. The last token of a run has no position of its own."""
    check_enough(runs, alpha, guarantee, of_which)
    if max_new_tokens <= min_positions:
        raise BitassayError(
            f"runs of {max_new_tokens} tokens have {max(max_new_tokens - 1, 0)} generated positions, "
            f"and a profile is fitted to runs with {min_positions} or more generated positions",
            f"ask for {min_positions + 1} tokens or more",
        )


def check_enough(runs: int, alpha: float, guarantee: Guarantee, of_which: str = "") -> None:
    """Raise BitassayError for fewer runs than give a p-value of `alpha` and a usable fit."""
    if not 0 < alpha < 1:
        raise BitassayError(f"alpha {alpha} is not between 0 and 1", "--alpha 0.05")
    scores = runs_needed(alpha, guarantee)
    needed = max(math.ceil(scores * 5 / 3) + 2, scores + 2 * MIN_FIT, 4 * MIN_FIT)
    if runs < needed:
        raise BitassayError(
            f"{runs} honest runs{of_which} are too few for alpha {alpha:g}, which needs {needed}",
            f"calibrate with {needed} prompts or more, longer outputs, or a larger alpha",
        )

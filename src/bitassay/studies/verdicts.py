"""Whether a verifier that expects the base model notices a quantized one: the columns of verification.

A profile is fitted to honest runs of the base model; then each model generates while it claims to be the
base model, and a verifier that holds the base model checks the traces.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.data.corpora import bundled_prompts
from bitassay.engines.decode import TokenIds
from bitassay.engines.prompts import encode_prompt
from bitassay.errors import BitassayError, at_least
from bitassay.models.identity import identity
from bitassay.quantization.recipe.recipe import BASE
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.record.progress import Progress, silent
from bitassay.verification.calibrate import calibrate, check_plan
from bitassay.verification.pooled import pooled_verdict
from bitassay.verification.profile import Profile
from bitassay.verification.prove import prove_many
from bitassay.verification.verify import verify_many

MAX_PROMPT_TOKENS = 96
PROOF_BATCH = 32
DISTANCE_FLOOR = 1e-12  # identical arithmetic on both sides gives a distance of exactly 0


@dataclass(frozen=True)
class Verification:
    """How verdicts are reached: `calibration_prompts` honest runs fit the profile, then `prompts` others are
    proved by every recipe."""

    prompts: int = 8
    calibration_prompts: int = 220
    new_tokens: int = 24
    alpha: float = 0.01

    def __post_init__(self) -> None:
        """Raises BitassayError for numbers that no verdict can come of."""
        at_least(1, prompts=self.prompts)
        check_plan(self.calibration_prompts, self.alpha, self.new_tokens, guarantee="average")
        wanted, there = self.prompts + self.calibration_prompts, len(bundled_prompts())
        if wanted > there:
            raise BitassayError(
                f"{wanted} prompts were asked for, the package has {there}",
                "fewer --prompts or --calibration-prompts",
            )


def honest_profile(
    plan: Verification, base: PreTrainedModel, prompts: list[TokenIds], progress: Progress = silent
) -> Profile:
    """Return a profile fitted to honest runs of `base`, checked by a verifier that holds it."""
    return calibrate(
        base,
        base,
        prompts,
        max_new_tokens=plan.new_tokens,
        alpha=plan.alpha,
        guarantee="average",
        batch_size=PROOF_BATCH,
        progress=progress,
    )


def verdict_columns(
    plan: Verification,
    base: PreTrainedModel,
    quantization: Quantization | None,
    prompts: list[TokenIds],
    profile: Profile,
    progress: Progress,
) -> dict[str, Any]:
    """Return the columns of one model: it proves under the base model's name, the base model verifies."""
    prover = base if quantization is None else with_tensors(base, quantization)
    progress(f"proving with {quantization.recipe.name if quantization else BASE}")
    traces = prove_many(
        prover, prompts, max_new_tokens=plan.new_tokens, claim=identity(base), batch_size=PROOF_BATCH
    )
    verdicts = verify_many(traces, base, profile=profile, alpha=plan.alpha)
    pooled = pooled_verdict(verdicts, plan.alpha)
    by_layer = [
        [d for v in verdicts if (d := v.distance(layer)) is not None] for layer in sorted(profile.layers)
    ]
    measured = all(by_layer)  # states that are not finite have no distance
    return {
        "hidden_distance": _geometric_mean(by_layer[-1]) if measured else None,
        "hidden_distance_by_layer": [_geometric_mean(d) for d in by_layer] if measured else None,
        "hidden_distance_range_by_layer": [[min(d), max(d)] for d in by_layer] if measured else None,
        "verdict": pooled.status,
        "traces": len(verdicts),
        "traces_passed": pooled.counts.get("PASS", 0),
        "p_value": pooled.p_value,
    }


def chosen_prompts(model: PreTrainedModel, count: int, seed: int) -> list[TokenIds]:
    """Return `count` bundled prompts of at most MAX_PROMPT_TOKENS tokens, shuffled, so that those that
    calibrate and those that are judged are exchangeable."""
    prompts = [encode_prompt(model, prompt) for prompt in bundled_prompts()]
    short = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT_TOKENS]
    if count > len(short):
        raise BitassayError(
            f"{count} prompts were asked for, the package has {len(short)} "
            f"of at most {MAX_PROMPT_TOKENS} tokens",
            "fewer --prompts or --calibration-prompts",
        )
    return [short[index] for index in np.random.default_rng(seed).permutation(len(short))[:count]]


def _geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, DISTANCE_FLOOR)))))

"""A calibration profile: how far honest runs are from the verifier, for one model and one pair of numerics.

It turns evidence into one score and the score into a p-value.

    z_l   = (mean log distance of layer l - mean_l) / sd_l for generated positions, and for prompt positions
            by the same mean_l, sd_l
    z_tok = (log(mean margin + OFFSET) - mean_tok) / sd_tok
    score = max over all of them
    p     = (1 + #{honest calibration scores >= score}) / (n + 1)

mean and sd come from the fit part of the calibration runs, the n honest scores from another part, so that the
score of one more honest run is equally likely to take any rank among them: P(p <= alpha) <= alpha, whatever
the distribution (split conformal prediction: Vovk et al. 2005; Papadopoulos et al. 2002). One combined score
instead of a Bonferroni correction over two p-values halves the honest runs that a given alpha needs.

Prompt positions are judged by the generated ones because an honest prefill is nearer to the verifier's own
prefill than cached decoding is, at times equal to the last bit, which leaves no spread to standardise by;
judged this way they never raise an honest score much, and wrong prompt states still do.

What the guarantee needs: the verified request is like the calibration prompts (exchangeable with them). It is
marginal over requests, not for each length.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.models.source import cache_folder
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json
from bitassay.verify.evidence import Evidence
from bitassay.verify.numerics import Numerics
from bitassay.verify.trace import ModelClaim, Sampling

SCHEMA_VERSION = 1
# Nats a token. Honest margins are mostly 0; one lost token among a few dozen, at the step of bf16 logits
# (1/16 between 8 and 16), must not count as far off.
OFFSET = 0.05
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fit(_Part):
    """Mean and standard deviation over the fit part."""

    mean: Finite
    sd: float = Field(gt=0, allow_inf_nan=False)

    def standardised(self, value: float) -> float:
        return (value - self.mean) / self.sd


class HeldOut(_Part):
    """Honest runs that took no part in fit or calibration: how many were refused at the profile's alpha, with
    the 95 % Clopper-Pearson interval."""

    n: int = Field(ge=1)
    rejected: int = Field(ge=0)
    interval: tuple[Finite, Finite]

    @property
    def false_positive_rate(self) -> float:
        return self.rejected / self.n


class Score(NamedTuple):
    """value is the larger of states and tokens; layer and part say where the states are farthest off."""

    value: float
    states: float
    tokens: float
    layer: int
    part: Literal["prompt", "generated"]


class Profile(_Part):
    """`layers` by layer number; `scores` ascending; `generated_positions` the range of them that was
    calibrated; dates in UTC."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelClaim
    prover: Numerics
    verifier: Numerics
    sampling: Sampling
    layers: Mapping[int, Fit] = Field(min_length=1, max_length=1024)
    tokens: Fit
    scores: tuple[Finite, ...] = Field(min_length=1, max_length=10**6)
    held_out: HeldOut
    alpha: float = Field(gt=0, lt=1)
    generated_positions: tuple[int, int]
    prompts_digest: str = Field(max_length=64)
    created: datetime
    expires: datetime

    @model_validator(mode="after")
    def _makes_sense(self) -> "Profile":
        if list(self.scores) != sorted(self.scores):
            raise ValueError("scores are not ascending")
        if not 1 <= self.generated_positions[0] <= self.generated_positions[1]:
            raise ValueError("generated_positions is not a range")
        if self.created.tzinfo is None or self.expires.tzinfo is None:
            raise ValueError("dates without a time zone")
        return self

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def digest(self) -> str:
        return digest_json(self.model_dump(mode="json"))

    @property
    def key(self) -> str:
        return profile_key(self.model, self.prover, self.verifier, self.sampling)

    def score(self, evidence: Evidence) -> Score:
        """How unlike an honest run: about 0 on average, larger is worse. The evidence must be of this
        profile's layers."""
        return evidence_score(evidence, self.layers, self.tokens)

    def p_value(self, score: float) -> float:
        """The share of runs as bad or worse among the honest ones and this one; never below 1 / (n + 1)."""
        return (1 + sum(honest >= score for honest in self.scores)) / (self.n + 1)

    def expired(self, now: datetime | None = None) -> bool:
        return (now or datetime.now(UTC)) >= self.expires


def evidence_score(evidence: Evidence, layers: Mapping[int, Fit], tokens: Fit) -> Score:
    """The score of one sequence, given the fits."""
    parts = [
        (layers[one.layer].standardised(value), one.layer, part)
        for one in evidence.layers
        for part, value in (("prompt", one.prompt), ("generated", one.generated))
        if value is not None
    ]
    (states, layer, part), by_tokens = max(parts), tokens.standardised(token_statistic(evidence))
    return Score(max(states, by_tokens), states, by_tokens, layer, part)  # type: ignore[arg-type]


def token_statistic(evidence: Evidence) -> float:
    """log(mean margin + OFFSET)."""
    return math.log(evidence.mean_margin + OFFSET)


def runs_needed(alpha: float) -> int:
    """Calibration scores without which no p-value can be as small as `alpha`: 1 / (n + 1) <= alpha."""
    return math.ceil(1 / alpha - 1e-9) - 1


def profile_key(model: ModelClaim, prover: Numerics, verifier: Numerics, sampling: Sampling) -> str:
    """What a profile is looked up by. The model's name, the seed and the length are no part of it."""
    named = model.model_dump(exclude={"name"})
    chosen = sampling.model_dump(include={"sampler", "temperature", "top_p"})
    return digest_json(
        {"model": named, "prover": prover.model_dump(), "verifier": verifier.model_dump(), "sampling": chosen}
    )


def profile_path(key: str) -> Path:
    return cache_folder() / "profiles" / f"{key[:32]}.json"


def write_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile, by default to where `find_profile` looks, and return the path."""
    path = path or profile_path(profile.key)
    write_json(path, profile.model_dump(mode="json"))
    return path


def read_profile(path: Path) -> Profile:
    """Read a profile that may come from anyone; a defect is a BitassayError that names the file and the
    field."""
    try:
        return Profile.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "profile"
        raise BitassayError(
            f"{path}: not a profile: {field}: {first['msg']}", "bitassay calibrate MODEL"
        ) from error


def find_profile(
    model: ModelClaim, prover: Numerics, verifier: Numerics, sampling: Sampling
) -> Profile | None:
    """The profile in the cache folder for this model, these numerics and this way of sampling; None where
    there is none."""
    path = profile_path(profile_key(model, prover, verifier, sampling))
    return read_profile(path) if path.is_file() else None

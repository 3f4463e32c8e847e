"""A calibration profile: how far honest runs are from the verifier, for one model and one pair of numerics.

It turns evidence of n generated positions into one score and the score into a p-value.

    z_l   = (mean log distance of layer l - mean_l(n)) / sd_l(n) for generated positions, and for prompt
            positions by the same mean_l, sd_l
    z_tok = (log(mean margin + OFFSET) - mean_tok(n)) / sd_tok(n)
    score = max over all of them
    p     = (1 + #{honest calibration scores >= score}) / (n_scores + 1)

**Length.** A mean over few positions spreads more than one over many, and few tokens rarely hold the one
that loses, so mean and sd depend on n. They are kept at a few lengths, a factor of sqrt(2) apart, and are
linear in log n between. No form such as sd^2 = a + b / n is assumed: distances follow it, but the log
of a mean of rare margins need not. The
honest scores are kept by length too: a trace whose host was asked for at most m + 1 tokens is compared with
the calibration runs as they were after at most m positions, which is what honest runs of that request are.

mean and sd come from the fit part of the calibration runs, the honest scores from another part, so that the
score of one more honest run is equally likely to take any rank among them: P(p <= alpha) <= alpha, whatever
the distribution, for each limit m (split conformal prediction: Vovk et al. 2005; Papadopoulos et al. 2002).
One combined score instead of a Bonferroni correction over two p-values halves the honest runs that a given
alpha needs.

Prompt positions are judged by the generated ones because an honest prefill is nearer to the verifier's own
prefill than cached decoding is, at times equal to the last bit, which leaves no spread to standardise by;
judged this way they never raise an honest score much, and wrong prompt states still do.

What the guarantee needs: the verified request is like the calibration prompts (exchangeable with them), and
its limit is within those calibrated. It is marginal over requests: for those of one limit that happen to end
early it holds only as well as the fit does.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.models.source import cache_folder
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json
from bitassay.verification.attribution import Attribution, Library
from bitassay.verification.evidence import Evidence
from bitassay.verification.numerics import Numerics
from bitassay.verification.trace import TOKENS, ModelClaim, Sampling

SCHEMA_VERSION = 2
ALPHA = 0.01  # how often an honest run may be accused, where nobody says otherwise
MAX_LENGTHS = 64  # a factor of sqrt(2) apart they reach from 1 to 2^31
# Nats a token. Honest margins are mostly 0; one lost token among a few dozen, at the step of bf16 logits
# (1/16 between 8 and 16), must not count as far off.
OFFSET = 0.05
Finite = Annotated[float, Field(allow_inf_nan=False)]
Part = Literal["prompt", "generated"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fit(_Part):
    """Mean and standard deviation of a statistic over the fit part, by `lengths`: generated positions,
    ascending."""

    lengths: tuple[Annotated[int, Field(ge=1, le=TOKENS)], ...] = Field(min_length=1, max_length=MAX_LENGTHS)
    mean: tuple[Finite, ...] = Field(max_length=MAX_LENGTHS)
    sd: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(max_length=MAX_LENGTHS)

    @model_validator(mode="after")
    def _is_a_curve(self) -> "Fit":
        if any(a >= b for a, b in pairwise(self.lengths)):
            raise ValueError("lengths are not ascending")
        if not len(self.lengths) == len(self.mean) == len(self.sd):
            raise ValueError("not one mean and one sd for each length")
        return self

    def at(self, n: int) -> tuple[float, float]:
        """Mean and sd for `n` generated positions: linear in log n between the lengths, constant beyond."""
        at, lengths = math.log(n), np.log(self.lengths)
        return float(np.interp(at, lengths, self.mean)), float(np.interp(at, lengths, self.sd))

    def standardised(self, value: float, n: int) -> float:
        mean, sd = self.at(n)
        return (value - mean) / sd


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
    part: Part


class Profile(_Part):
    """`layers` by layer number; `generated_positions` the range of them that was calibrated; `scores` of each
    honest run, cut to as many positions as that range begins with, one more, and so on up to all that the run
    has; `library` what suspects look like, which names and never decides; dates in UTC."""

    schema_version: Literal[2] = SCHEMA_VERSION
    model: ModelClaim
    prover: Numerics
    verifier: Numerics
    sampling: Sampling
    layers: Mapping[int, Fit] = Field(min_length=1, max_length=1024)
    tokens: Fit
    scores: tuple[Annotated[tuple[Finite, ...], Field(min_length=1, max_length=TOKENS)], ...] = Field(
        min_length=1, max_length=10**6
    )
    held_out: HeldOut
    alpha: float = Field(gt=0, lt=1)
    generated_positions: tuple[int, int]
    prompts_digest: str = Field(max_length=64)
    library: Library | None = None
    created: datetime
    expires: datetime

    @model_validator(mode="after")
    def _makes_sense(self) -> "Profile":
        low, high = self.generated_positions
        if not 1 <= low <= high <= TOKENS:
            raise ValueError("generated_positions is not a range")
        if max(map(len, self.scores)) > high - low + 1:
            raise ValueError("scores of more positions than generated_positions allows")
        if self.created.tzinfo is None or self.expires.tzinfo is None:
            raise ValueError("dates without a time zone")
        if self.library and self.library.dimensions != 2 * len(self.layers) + 1:
            raise ValueError("the library is of other statistics")
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

    def honest_scores(self, limit: int) -> list[float]:
        """Of the calibration runs after at most `limit` generated positions."""
        most = max(limit - self.generated_positions[0], 0)
        return [scores[min(most, len(scores) - 1)] for scores in self.scores]

    def p_value(self, score: float, limit: int) -> float:
        """The share of runs as bad or worse among the honest ones that were asked for at most `limit`
        generated positions, and this one; never below 1 / (n + 1)."""
        return (1 + sum(honest >= score for honest in self.honest_scores(limit))) / (self.n + 1)

    def attribution(self, evidence: Evidence) -> Attribution | None:
        """What the evidence fits best; None without a library, and for runs too short for it."""
        length = self.library.length(evidence.n_generated) if self.library else None
        if self.library is None or length is None:
            return None
        return self.library.attribute(statistics(evidence.prefix(length), self.layers, self.tokens), length)

    def expired(self, now: datetime | None = None) -> bool:
        return (now or datetime.now(UTC)) >= self.expires


def evidence_score(evidence: Evidence, layers: Mapping[int, Fit], tokens: Fit) -> Score:
    """The score of one sequence, given the fits."""
    states, by_tokens = standardised(evidence, layers, tokens)
    (value, layer, part) = max(states)
    return Score(max(value, by_tokens), value, by_tokens, layer, part)


def standardised(
    evidence: Evidence, layers: Mapping[int, Fit], tokens: Fit
) -> tuple[list[tuple[float, int, Part]], float]:
    """The standardised statistics: (z, layer, part) of the states, and that of the tokens."""
    n = len(evidence.margins) - 1
    states = [
        (layers[one.layer].standardised(value, n), one.layer, part)
        for one in evidence.layers
        for part, value in (("prompt", one.prompt), ("generated", one.generated))
        if value is not None
    ]
    return states, tokens.standardised(token_statistic(evidence), n)  # type: ignore[return-value]


def statistics(
    evidence: Evidence, layers: Mapping[int, Fit], tokens: Fit
) -> Float64[np.ndarray, " statistics"]:
    """All standardised statistics: by layer those of generated and prompt positions, then the tokens'."""
    states, by_tokens = standardised(evidence, layers, tokens)
    return np.array([z for z, *_ in sorted(states, key=lambda one: one[1:])] + [by_tokens])


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
    content = read_json(path)
    if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
        found = content.get("schema_version")
        raise BitassayError(
            f"{path}: a profile of version {found!r:.40}; this reads {SCHEMA_VERSION}",
            "bitassay calibrate MODEL",
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "profile"
        raise BitassayError(
            f"{path}: not a profile: {field}: {first['msg']}", "bitassay calibrate MODEL"
        ) from error


def find_profile(
    model: ModelClaim, prover: Numerics, verifier: Numerics, sampling: Sampling
) -> Profile | None:
    """The profile in the cache folder for this model, these numerics and this way of sampling, else one from
    before profiles knew the configuration; None where there is none."""
    for claim in (model, model.model_copy(update={"config_digest": None})):
        path = profile_path(profile_key(claim, prover, verifier, sampling))
        if path.is_file():
            return read_profile(path)
    return None

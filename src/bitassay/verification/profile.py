"""A calibration profile: what honest runs look like to the verifier, for one model and one pair of numerics.

It is one JSON file. It holds the fit of each series of the detectors that decide, and the scores of other
honest runs (`scores.py`). The scores are kept by length too: a trace whose host was asked for at most
m + 1 tokens is compared with the calibration runs as they were after at most m positions, which is what
honest runs of that request are.

A profile may be signed, by whoever calibrated it, so that another verifier need not calibrate.

What the guarantee needs: the verified request is like the calibration prompts (exchangeable with them), and
its limit is within those calibrated. It is marginal over requests, of which those that happen to end early
are few. A run that ended early is therefore also compared with the calibration runs as they were after as
many positions; where it ranks lower among these, that rank counts, which can only lower the rate of false
positives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.models.source import cache_folder
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json
from bitassay.record.schema import Fields
from bitassay.verification.attribution import Attribution, Library
from bitassay.verification.container import first_defect
from bitassay.verification.detectors.detector import Part
from bitassay.verification.detectors.excess_distance import ROUNDING
from bitassay.verification.detectors.registry import BY_LAYER, DECIDING, STATES
from bitassay.verification.detectors.token_difr import TOKEN_DIFR
from bitassay.verification.numerics import Numerics
from bitassay.verification.observe import Observation
from bitassay.verification.receipts.keys import public_key
from bitassay.verification.scores import (
    Finite,
    Fit,
    Guarantee,
    Statistic,
    p_value,
    ranked_alike,
    refusal,
    standardise,
    statistics,
)
from bitassay.verification.trace import TOKENS, ModelClaim, Sampling

SCHEMA_VERSION = 4
SIGNED = b"bitassay profile 1\0"  # what a signature is of, before the digest
MAX_DAYS = 400
MARGINS = TOKEN_DIFR.name
UNLIKE = 0.01  # the share of requests like those of calibration that count as unlike them
ALPHA = 0.01  # the default false-positive rate of a verdict on an honest run


ScoreValue = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False, strict=True)]


class HeldOut(Fields):
    """Honest runs that took no part in fit or calibration: how many were refused at the profile's alpha, with
    the 95 % Clopper-Pearson interval."""

    n: int = Field(ge=1)
    rejected: int = Field(ge=0)
    interval: tuple[Finite, Finite]

    @classmethod
    def of(cls, rejected: int, n: int) -> "HeldOut":
        """Return it with its interval."""
        return cls(n=n, rejected=rejected, interval=clopper_pearson_interval(rejected, n))

    @model_validator(mode="after")
    def _is_of_its_counts(self) -> "HeldOut":
        expected = clopper_pearson_interval(self.rejected, self.n) if self.rejected <= self.n else (2.0, 2.0)
        if not np.allclose(self.interval, expected, atol=1e-6):
            raise ValueError("the interval is not that of its counts")
        return self

    @property
    def false_positive_rate(self) -> float:
        """Return the share that was refused."""
        return self.rejected / self.n


@dataclass(frozen=True)
class Score:
    """value: the largest of all detectors, each by name in `detectors`. layer and part: where the states are
    farthest off."""

    value: float
    detectors: Mapping[str, float]
    layer: int
    part: Part

    @classmethod
    def of(cls, computed: list[Statistic], layers: tuple[int, ...]) -> "Score":
        """Return the score of standardised statistics. layers: those of the distances."""
        largest: dict[str, float] = {}
        for detector, _, _, value in computed:
            largest[detector] = max(value, largest.get(detector, value))
        last = Statistic(STATES, len(layers) - 1, "generated", -math.inf)  # where states are not shown
        shown = (each for each in computed if each.detector in BY_LAYER)
        farthest = max(shown, key=lambda statistic: statistic.value, default=last)
        return cls(max(largest.values()), largest, layers[farthest.series], farthest.part)


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
Fitted = Annotated[tuple[Fit, ...], Field(min_length=1, max_length=1024)]
ByLength = Annotated[tuple[ScoreValue, ...], Field(min_length=1, max_length=TOKENS)]


class Signature(Fields):
    """Who vouches for a profile: an Ed25519 key and its signature of SIGNED and the digest, in hex."""

    key: str = Field(pattern="^[0-9a-f]{64}$")
    value: str = Field(pattern="^[0-9a-f]{128}$")


class Profile(Fields):
    """layers: those sampled. detectors: the fits of all that decide, one a series. control: those of the
    control, by layer. scores: of each honest run, cut to as many positions as `generated_positions` begins
    with, one more, and so on up to all that the run has. unlike: of the same runs in the same way, how
    unusual the noise of the text is. left_out: honest runs of domains of text, each judged by the runs of all
    other domains (`left_out.py`). library: what suspects look like, which names and never decides. Dates
    are in UTC."""

    schema_version: Literal[4] = SCHEMA_VERSION
    model: ModelClaim
    prover: Numerics
    verifier: Numerics
    sampling: Sampling
    layers: tuple[Annotated[int, Field(ge=1, le=2**31)], ...] = Field(min_length=1, max_length=1024)
    detectors: Mapping[Name, Fitted] = Field(min_length=1, max_length=64)
    control: Fitted
    scores: tuple[ByLength, ...] = Field(min_length=1, max_length=10**6)
    unlike: tuple[ByLength, ...] = Field(min_length=1, max_length=10**6)
    held_out: HeldOut
    left_out: HeldOut | None = None
    alpha: float = Field(gt=0, lt=1)
    guarantee: Guarantee = "conditional"
    generated_positions: tuple[int, int]
    prompts_digest: str = Field(max_length=64)
    library: Library | None = None
    created: datetime
    expires: datetime
    signature: Signature | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Profile":
        low, high = self.generated_positions
        if not 1 <= low <= high <= TOKENS:
            raise ValueError("generated_positions is not a range")
        lengths = list(map(len, self.scores))
        if max(lengths) > high - low + 1:
            raise ValueError("scores of more positions than generated_positions allows")
        if lengths != list(map(len, self.unlike)):
            raise ValueError("not as many numbers in unlike as in scores")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers are not ascending")
        if missing := sorted(set(DECIDING) - set(self.detectors)):
            raise ValueError(f"no fit of {missing[0]}")
        if any(
            len(fits) != len(self.layers)
            for fits in (self.control, *(self.detectors[name] for name in BY_LAYER))
        ):
            raise ValueError("not one fit for each layer")
        if self.created.tzinfo is None or self.expires.tzinfo is None:
            raise ValueError("dates without a time zone")
        if not self.created < self.expires <= self.created + timedelta(days=MAX_DAYS):
            raise ValueError(f"it expires before it was created, or more than {MAX_DAYS} days after")
        if self.created > datetime.now(UTC) + timedelta(days=1):
            raise ValueError("it was created in the future")
        if self.library and self.library.dimensions != 2 * len(self.layers) + 1:
            raise ValueError("the library is of other statistics")
        return self

    @property
    def n(self) -> int:
        """Return the number of honest runs that p-values count."""
        return len(self.scores)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the profile's content, without its signature."""
        return digest_json(self.model_dump(mode="json", exclude={"signature"}))

    @property
    def key(self) -> str:
        """Return what the profile is looked up by."""
        return profile_key(self.model, self.prover, self.verifier, self.sampling)

    @property
    def fits(self) -> Mapping[str, tuple[Fit, ...]]:
        """Return the fits of all detectors that decide, by name, one a series."""
        return self.detectors

    def score(self, observation: Observation) -> Score:
        """Return how unlike an honest run it is: about 0 on average, larger is worse. The observation must
        have this profile's layers and detectors."""
        computed = statistics(observation, list(self.fits))
        assert computed is not None
        return Score.of(standardise(computed, self.fits, observation.tokens - 1), observation.layers)

    def honest_scores(self, limit: int) -> list[float]:
        """Return the scores of the calibration runs after at most `limit` generated positions."""
        return self._at(self.scores, limit)

    def ranked(self, score: float, limit: int, positions: int) -> float:
        """Return the score that counts of a run that was asked for at most `limit` generated positions and
        has so many: its own, or a lower one where it ranks lower among calibration runs as short as it."""
        return ranked_alike(score, self.honest_scores(positions), self.honest_scores(limit))

    def p_value(self, score: float, limit: int) -> float:
        """Return the p-value of a run that was asked for at most `limit` generated positions; never below
        1 / (n + 1)."""
        return p_value(score, self.honest_scores(limit))

    def refusal(self, score: float, limit: int) -> float:
        """Return the smallest alpha at which such a run is refused, by this profile's guarantee."""
        return refusal(score, self.honest_scores(limit), self.guarantee)

    def unlike_p_value(self, observation: Observation, limit: int) -> float:
        """Return the share of calibration texts, and of this one, whose rounding noise is as unusual or more;
        see `unlike`."""
        return p_value(unlike(observation, self.control), self._at(self.unlike, limit))

    def _at(self, by_run: Sequence[Sequence[float]], limit: int) -> list[float]:
        most = max(limit - self.generated_positions[0], 0)
        return [values[min(most, len(values) - 1)] for values in by_run]

    def attribution(self, observation: Observation) -> Attribution | None:
        """Return what the observation fits best; None without a library, and for runs too short for it."""
        length = self.library.length(observation.positions) if self.library else None
        if self.library is None or length is None:
            return None
        return self.library.attribute(library_statistics(observation, self.fits, length), length)

    def expired(self, now: datetime | None = None) -> bool:
        """Return whether the profile is no longer valid."""
        return (now or datetime.now(UTC)) >= self.expires


def unlike(observation: Observation, control: Sequence[Fit], positions: int | None = None) -> float:
    """Return how unusual the rounding noise of the text is, over its first generated positions (default:
    all): the largest |z| of the control over layers. It says nothing about the host, but whether honest runs
    of such texts are known."""
    n = observation.positions if positions is None else positions
    series = observation.series[ROUNDING.name]
    z = [
        fit.standardised(ROUNDING.statistics(each, n, n + 1)["generated"], n)
        for each, fit in zip(series, control, strict=True)
    ]
    return max(map(abs, z))


def library_statistics(
    observation: Observation, fits: Mapping[str, tuple[Fit, ...]], length: int
) -> np.ndarray:
    """Return what attribution looks at, of a run cut at `length`: the z of each layer's generated and prompt
    positions, then the mean margin's; the other checks of tokens have long tails, unlike a Gaussian."""
    computed = statistics(observation, (STATES, MARGINS), length, length + 1)
    assert computed is not None
    return np.array([statistic.value for statistic in standardise(computed, fits, length)])


def signed(profile: Profile, key: Ed25519PrivateKey) -> Profile:
    """Return the profile with a signature of its content by `key`."""
    value = key.sign(SIGNED + bytes.fromhex(profile.digest)).hex()
    signature = Signature(key=key.public_key().public_bytes_raw().hex(), value=value)
    return profile.model_copy(update={"signature": signature})


def check_signature(profile: Profile, where: Path, signer: bytes | None = None) -> None:
    """Raise BitassayError, which names the file, where a signature is not of this content or of a key that
    anybody could sign for; and, where `signer` is given, where it is not signed by that key."""
    signature = profile.signature
    if signature is None:
        if signer is not None:
            raise BitassayError(
                f"{where}: the profile is not signed", "calibrate --key, or without --profile-signer"
            )
        return
    key = public_key(signature.key)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(
            bytes.fromhex(signature.value), SIGNED + bytes.fromhex(profile.digest)
        )
    except InvalidSignature:
        raise BitassayError(
            f"{where}: the signature is not of this profile", "ask for the file again, or calibrate yourself"
        ) from None
    if signer is not None and signer != key:
        raise BitassayError(
            f"{where}: the profile is signed by {signature.key}, not by {signer.hex()}", "name its signer"
        )


def profile_key(model: ModelClaim, prover: Numerics, verifier: Numerics, sampling: Sampling) -> str:
    """Return what a profile is looked up by. The model's name, the seed and the length are no part of it."""
    named = model.model_dump(exclude={"name"})
    chosen = sampling.model_dump(include={"sampler", "temperature", "top_p"})
    return digest_json(
        {"model": named, "prover": prover.model_dump(), "verifier": verifier.model_dump(), "sampling": chosen}
    )


def profile_path(key: str) -> Path:
    """Return where a profile lies in the cache folder."""
    return cache_folder() / "profiles" / f"{key[:32]}.json"


def write_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile, by default to where `find_profile` looks, and return the path."""
    path = path or profile_path(profile.key)
    write_json(path, profile.model_dump(mode="json"))
    return path


def read_profile(path: Path, signer: bytes | None = None) -> Profile:
    """Read a profile that may come from anyone. signer: the public key that must have signed it. Raises
    BitassayError that names the file and the field."""
    content = read_json(path)
    if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
        version = f"version {content.get('schema_version')!r:.40}"
        raise BitassayError(
            f"{path}: a profile of {version}; this reads {SCHEMA_VERSION}", "bitassay calibrate MODEL"
        )
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        raise BitassayError(
            f"{path}: not a profile: {first_defect(error)}", "bitassay calibrate MODEL"
        ) from error
    check_signature(profile, path, signer)
    return profile


def find_profile(
    model: ModelClaim, prover: Numerics, verifier: Numerics, sampling: Sampling
) -> Profile | None:
    """Return the profile in the cache folder for this model, these numerics and this way of sampling, else
    one from before profiles knew the configuration; None where there is none."""
    for claim in (model, model.model_copy(update={"config_digest": None})):
        path = profile_path(profile_key(claim, prover, verifier, sampling))
        if path.is_file():
            return read_profile(path)
    return None

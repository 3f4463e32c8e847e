"""The verifier's decision: `verify`, `verify_many`, `pooled_verdict`.

    FAIL          a structural defect, a non-finite mismatch, or p <= alpha by the calibration profile
    INCONCLUSIVE  nothing structural is wrong, but no valid profile covers this trace
    PASS          nothing structural is wrong and p > alpha

The VeriLLM statistics of both rule sets are reported with every verdict, but they do not decide (see
`verillm.py`). PASS says that this trace looks like an honest run of the verifier's model; it does not say
that the host served these tokens to anybody.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from math import exp
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.sampling import Sampler
from bitassay.models.identity import identity
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.attribution import Attribution
from bitassay.verification.evidence import Evidence, gather
from bitassay.verification.numerics import numerics
from bitassay.verification.profile import Profile, Score, find_profile, profile_key, read_profile, runs_needed
from bitassay.verification.structure import Reason, Request, claim_defects, shape_defects
from bitassay.verification.trace import Header, ModelClaim, Trace, TraceError

Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]
STATISTICAL = frozenset({"states-too-far", "tokens-unlikely"})  # codes of a FAIL that could be bad luck


@dataclass(frozen=True)
class Verdict:
    """status and why, with the numbers that led there; those are None where they could not be computed.

    n_tokens: output tokens. p_value, score, alpha, n_calibration: from the profile whose digest is `profile`.
    limit: the generated positions that the honest runs were cut at which the score was ranked among.
    evidence: distances by layer, VeriLLM statistics, margins by token. trace: digest of the header judged.
    calibration: the profile itself. attribution: what the evidence fits best, where the profile has a
    library; it has no part in the status.
    """

    status: Status
    reasons: tuple[Reason, ...]
    model: str
    n_tokens: int
    evidence: Evidence | None = None
    p_value: float | None = None
    score: Score | None = None
    alpha: float | None = None
    profile: str | None = None
    n_calibration: int | None = None
    limit: int | None = None
    trace: str | None = None
    calibration: Profile | None = field(default=None, repr=False, compare=False)
    attribution: Attribution | None = None

    @property
    def structural(self) -> tuple[Reason, ...]:
        """Why it fails whatever the statistics say."""
        reasons = self.reasons if self.status == "FAIL" else ()
        return tuple(reason for reason in reasons if reason.code not in STATISTICAL)

    @property
    def hidden_distance(self) -> float | None:
        """Geometric mean of the relative distance over generated positions at the last sampled layer."""
        return self.distance(self.evidence.layers[-1].layer) if self.evidence else None

    def distance(self, layer: int, part: Literal["prompt", "generated"] = "generated") -> float | None:
        """Geometric mean of the relative distance over one part's positions at one sampled layer."""
        found = (
            next((one for one in self.evidence.layers if one.layer == layer), None) if self.evidence else None
        )
        value = getattr(found, part, None)
        return None if value is None else exp(value)

    def accept_rate(self, rules: str, part: Literal["prompt", "generated"] = "generated") -> float | None:
        """Accepted cells / cells compared over all sampled layers, by the VeriLLM rule set `rules`."""
        summaries = (
            [one.verillm[part][rules] for one in self.evidence.layers if one.verillm] if self.evidence else []
        )
        cells = sum(one["cells"] for one in summaries)
        return sum(one["accept_rate"] * one["cells"] for one in summaries) / cells if cells else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        layers = self.evidence.layers if self.evidence else ()
        margins = self.evidence.margins if self.evidence else ()
        return {
            "status": self.status,
            "reasons": [asdict(reason) for reason in self.reasons],
            "model": self.model,
            "n_tokens": self.n_tokens,
            "p_value": self.p_value,
            "alpha": self.alpha,
            "score": self.score._asdict() if self.score else None,
            "profile": self.profile,
            "n_calibration": self.n_calibration,
            "limit": self.limit,
            "trace_digest": self.trace,
            "attribution": self.attribution.to_dict() if self.attribution else None,
            "hidden_distance": self.hidden_distance,
            "mean_margin": self.evidence.mean_margin if self.evidence else None,
            "max_margin": max(margins) if margins else None,
            "tokens_not_chosen": sum(margin > 0 for margin in margins) if margins else None,
            "margins": list(margins),
            "accept_rate": {rules: self.accept_rate(rules) for rules in ("paper", "documents")},
            "format": self.evidence.format if self.evidence else None,
            "layers": [
                {
                    "layer": one.layer,
                    "prompt_distance": self.distance(one.layer, "prompt"),
                    "generated_distance": self.distance(one.layer),
                    "verillm": one.verillm,
                }
                for one in layers
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.status}: {'; '.join(reason.sentence for reason in self.reasons)}"]
        if self.evidence:
            distances = ", ".join(
                f"{self.distance(one.layer) or 0:.3g} at layer {one.layer}" for one in self.evidence.layers
            )
            lines.append(
                f"  states: relative distance {distances} ({self.evidence.n_generated} generated positions)"
            )
            lines.append(
                f"  tokens: mean margin {self.evidence.mean_margin:.3g} nats over {self.n_tokens} tokens"
            )
        if self.p_value is not None:
            lines.append(
                f"  p-value {self.p_value:.3g} against {self.n_calibration} honest runs, alpha {self.alpha:g}"
            )
        if self.attribution and self.status == "FAIL":
            lines.append(f"  fits best: {self.attribution}")
        return "\n".join(lines)


def verify(
    trace: Trace,
    model: PreTrainedModel,
    *,
    profile: Profile | str | Path | None = None,
    alpha: float | None = None,
    expected_prompt: str | TokenIds | None = None,
    expected_nonce: str | None = None,
    expected_sampler: Sampler | None = None,
    expected_max_new_tokens: int | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Check `trace` against the verifier's own `model`.

    profile: a calibration profile or its path; default: the one in the cache folder for this model and these
    numerics. alpha: the false-positive rate that is accepted (default: the profile's). expected_*: what was
    asked for; what is given is checked.
    """
    request = Request(expected_prompt, expected_nonce, expected_sampler, expected_max_new_tokens)
    return verify_many([trace], model, profile=profile, alpha=alpha, requests=[request], now=now)[0]


def verify_many(
    traces: Sequence[Trace],
    model: PreTrainedModel,
    *,
    profile: Profile | str | Path | None = None,
    alpha: float | None = None,
    requests: Sequence[Request] | None = None,
    now: datetime | None = None,
    progress: Progress = silent,
) -> list[Verdict]:
    """`verify` for many traces, with prefills in batches; `requests` says what each was asked for, in the
    same order."""
    requests = [Request()] * len(traces) if requests is None else list(requests)
    assert len(requests) == len(traces)
    profile = read_profile(Path(profile)) if isinstance(profile, (str, Path)) else profile
    shapes = [shape_defects(trace, model) for trace in traces]
    sound = [index for index, defects in enumerate(shapes) if not defects]
    gathered = gather([traces[index] for index in sound], model, progress=progress)
    evidence = dict(zip(sound, gathered, strict=True))
    verdicts = []
    for index, (trace, request) in enumerate(zip(traces, requests, strict=True)):
        if shapes[index]:
            verdicts.append(Verdict("FAIL", tuple(shapes[index]), identity(model).name, _tokens(trace)))
            continue
        claims = claim_defects(trace, model, request)
        verdicts.append(decide(trace, model, evidence[index], claims, profile, alpha, now))
    return verdicts


def failed(error: TraceError, model: str) -> Verdict:
    """The verdict on a trace that could not even be read."""
    return Verdict("FAIL", (Reason(error.code, error.problem),), model, 0)


def decide(
    trace: Trace,
    model: PreTrainedModel,
    evidence: Evidence,
    claims: list[Reason],
    profile: Profile | None,
    alpha: float | None,
    now: datetime | None,
    more_doubts: Sequence[Reason] = (),
) -> Verdict:
    """Structure first, then statistics; a structural FAIL carries the statistics too where a profile fits.
    more_doubts: other reasons why the statistics cannot decide."""
    name = identity(model).name
    if profile is None:
        profile = profile_for(trace.header, model)
    reasons, doubts = (
        [*claims, *_refused_cells(evidence)],
        [*more_doubts, *profile_doubts(profile, trace, model, evidence, alpha, now)],
    )
    if profile is None or doubts:
        status: Status = "FAIL" if reasons else "INCONCLUSIVE"
        return Verdict(status, tuple(reasons or doubts), name, trace.n_tokens, evidence)
    alpha, score = alpha or profile.alpha, profile.score(evidence)
    limit = min(trace.header.sampling.max_new_tokens - 1, profile.generated_positions[1])
    p_value = profile.p_value(score.value, limit)
    if p_value <= alpha:
        reasons += _too_far(score, profile, alpha, limit)
    status = "FAIL" if reasons else "PASS"
    reasons = reasons or [Reason("as-honest", _as_honest(trace.header))]
    return Verdict(
        status,
        tuple(reasons),
        name,
        trace.n_tokens,
        evidence,
        p_value,
        score,
        alpha,
        profile.digest,
        profile.n,
        limit,
        digest_json(trace.header.model_dump(mode="json")),
        profile,
        profile.attribution(evidence),
    )


def profile_for(header: Header, model: PreTrainedModel) -> Profile | None:
    """The profile in the cache folder for what `header` claims and the verifier's own `model`; None where
    there is none."""
    return find_profile(ModelClaim.of(identity(model)), header.numerics, numerics(model), header.sampling)


def profile_doubts(
    profile: Profile | None,
    trace: Trace,
    model: PreTrainedModel,
    evidence: Evidence,
    alpha: float | None = None,
    now: datetime | None = None,
) -> list[Reason]:
    """Why `profile` cannot decide on this trace; empty where it can."""
    header, own, here = trace.header, ModelClaim.of(identity(model)), numerics(model)
    if profile is None:
        pair = f"prover {header.numerics} and verifier {here}"
        sentence = f"no calibration profile for {own.name} with {pair}; run bitassay calibrate"
        return [Reason("no-profile", sentence)]
    found = []
    if not profile.model.is_same_model(own):
        found.append(
            Reason("profile-other-model", f"the profile is of {profile.model.name}, another model or recipe")
        )
    elif profile.key != profile_key(profile.model, header.numerics, here, header.sampling):
        pairs = (("prover", profile.prover, header.numerics), ("verifier", profile.verifier, here))
        differ = [f"{side} {theirs} instead of {ours}" for side, ours, theirs in pairs if ours != theirs]
        found.append(
            Reason(
                "profile-other-numerics",
                f"the profile is of other runs: {'; '.join(differ) or 'another sampler'}",
            )
        )
    elif profile.model.config_digest and not header.model.config_digest:
        sentence = "the trace does not say with which configuration; a profile of before can decide on it"
        found.append(Reason("no-configuration", sentence))
    elif set(profile.layers) != set(header.layers):
        found.append(Reason("profile-other-model", f"the profile is of layers {sorted(profile.layers)}"))
    if profile.expired(now):
        found.append(
            Reason(
                "profile-expired",
                f"the profile expired on {profile.expires:%Y-%m-%d}; run bitassay calibrate again",
            )
        )
    low, high = profile.generated_positions
    if not low <= evidence.n_generated <= high:
        code = "too-few-tokens" if evidence.n_generated < low else "beyond-profile"
        found.append(
            Reason(
                code,
                f"{evidence.n_generated} generated positions; the profile was calibrated on {low} to {high}",
            )
        )
    if profile.n < (needed := runs_needed(alpha or profile.alpha)):
        found.append(
            Reason(
                "profile-too-small",
                f"alpha {alpha or profile.alpha:g} needs {needed} honest runs, the profile has {profile.n}",
            )
        )
    return found


def _as_honest(header: Header) -> str:
    sentence = "states and tokens are those of an honest run"
    if header.model.config_digest is None:
        sentence += "; the trace does not say with which configuration, as older ones do not"
    return sentence


def _refused_cells(evidence: Evidence) -> list[Reason]:
    cells = sum(
        one.verillm[part]["paper"]["refused_cells"] for one in evidence.layers for part in one.verillm
    )
    sentence = f"in {cells} cells a number is NaN or infinite on one side only in {evidence.format}"
    return [Reason("nonfinite-mismatch", sentence)] if cells else []


def _too_far(score: Score, profile: Profile, alpha: float, limit: int) -> list[Reason]:
    """Which half of the evidence is too unlike honest runs by itself; both where both are."""
    found = []
    if profile.p_value(score.states, limit) <= alpha:
        where = f"{score.part} positions at layer {score.layer}"
        found.append(
            Reason(
                "states-too-far",
                f"hidden states are {score.states:.1f} sd farther off than honest ones ({where})",
            )
        )
    if profile.p_value(score.tokens, limit) <= alpha:
        found.append(
            Reason(
                "tokens-unlikely",
                f"this model would take other tokens ({score.tokens:.1f} sd worse than honest ones)",
            )
        )
    return found


def _tokens(trace: Trace) -> int:
    return len(trace.header.output_ids)

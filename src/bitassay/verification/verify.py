"""The verifier's decision: `verify`, `verify_many`, `verify_opening`.

    FAIL          a structural defect, a non-finite mismatch, or refused at alpha by the calibration profile
    INCONCLUSIVE  nothing structural is wrong, but no valid profile covers this trace
    PASS          nothing structural is wrong, and it is not refused

A profile covers texts whose rounding noise is like that of its calibration texts. That is a test of its own,
which looks at the verifier's prefills alone: a text that is unlike them is INCONCLUSIVE, but for a run that
is FAR from honest ones, which no text explains.

Hidden states alone are forgeable: decode with a cheap model, then run one honest prefill over its tokens. So
the profile judges states and tokens (`detectors/registry.py` names the detectors that decide). The VeriLLM
statistics of both rule sets are reported with every verdict, but they do not decide. PASS says that this
trace looks like an honest run of the verifier's model; it does not say that the host served these tokens to
anybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.sampling import Sampler
from bitassay.models.identity import identity
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.distance import DISTANCE
from bitassay.verification.detectors.excess_distance import ROUNDING
from bitassay.verification.detectors.registry import BY_LAYER, DECIDING, HEAD, ROTARY, STATES, TOKEN_DETECTORS
from bitassay.verification.detectors.verillm import FORMAT_OF_DTYPE, CellStatistics, run_statistics
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import Observation, compared, reduced
from bitassay.verification.profile import UNLIKE, Profile, Score, find_profile, profile_key, read_profile
from bitassay.verification.receipts.challenge import Challenge
from bitassay.verification.receipts.opening import Opening
from bitassay.verification.receipts.receipt import Receipt
from bitassay.verification.scores import checked_alpha, lower_bound, runs_needed
from bitassay.verification.structure import Reason, RefusedError, Request, Status
from bitassay.verification.submissions import CheckResult, check_opened, check_submission
from bitassay.verification.trace import Header, ModelClaim, Trace, TraceError
from bitassay.verification.verdict import Verdict

FAR = 10.0  # honest standard deviations beyond which a run fails whatever its text


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
    """Return the verdict on `trace` by a verifier that holds `model`.

    profile: a calibration profile or its path (default: the one in the cache folder for this model and these
    numerics). alpha: the false-positive rate that is accepted (default: the profile's). expected_*: what was
    asked for; only what is given is checked.
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
    """Return the verdicts of `verify` on many traces, with prefills in batches. requests: what each was asked
    for, in the same order."""
    requests = [Request()] * len(traces) if requests is None else requests
    checked = [
        check_submission(trace, model, request) for trace, request in zip(traces, requests, strict=True)
    ]
    profile = read_profile(Path(profile)) if isinstance(profile, (str, Path)) else profile
    return _verdicts(checked, model, profile, alpha, now, progress)


def verify_opening(
    receipt: Receipt,
    challenge: Challenge,
    opening: Opening,
    model: PreTrainedModel,
    *,
    signer: bytes | None,
    profile: Profile | None = None,
    alpha: float | None = None,
    request: Request | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Return the verdict on a receipt and on what was opened of it, without the trace.

    challenge: the one that the verifier itself made. signer: the host's public key, as the verifier knows it
    from elsewhere; None: not known, and then there is neither a PASS nor a statistical FAIL, because anyone
    could have signed. profile: default, the one in the cache folder. request: what was asked for. The tokens
    are judged in full, the states by the opened positions: these must be at least as many as the profile was
    calibrated on.
    """
    checked = check_opened(receipt, challenge, opening, model, request or Request(), signer)
    return _verdicts([checked], model, profile, alpha, now)[0]


def failed(error: TraceError, model: str) -> Verdict:
    """Return the verdict on a trace that could not even be read."""
    if isinstance(error, RefusedError):
        return Verdict("FAIL", error.reasons, model, error.tokens)
    return Verdict("FAIL", (Reason(error.code, error.problem),), model, 0)


def _verdicts(
    checked: Sequence[CheckResult],
    model: PreTrainedModel,
    profile: Profile | None,
    alpha: float | None,
    now: datetime | None,
    progress: Progress = silent,
) -> list[Verdict]:
    name = identity(model).name
    verdicts = [Verdict("FAIL", result.defects, name, result.tokens) for result in checked]
    opened = {
        index: result.opened for index, result in enumerate(checked) if result.opened and result.answers
    }
    for index, comparison in compared(opened, model, progress):
        verdicts[index] = decide(checked[index], comparison, model, profile, alpha, now)
    return verdicts


def decide(
    checked: CheckResult,
    comparison: Comparison,
    model: PreTrainedModel,
    profile: Profile | None = None,
    alpha: float | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Return the verdict on one comparison: structure first, then statistics; a structural FAIL carries the
    statistics too where a profile fits."""
    header = comparison.header
    profile = profile or profile_for(header, model)
    names = dict.fromkeys((DISTANCE.name, ROUNDING.name, *DECIDING, *(profile.fits if profile else ())))
    observation, cells = reduced(comparison, list(names)), run_statistics(comparison)
    evidence = Verdict(
        "INCONCLUSIVE",
        (),
        identity(model).name,
        checked.tokens,
        observation,
        cells,
        comparison.n_prompt,
        _format(model),
    )
    judged = observation
    if profile and len(comparison.positions) < len(header.positions):
        judged = lower_bound(observation, header, profile.fits, profile.generated_positions[1])
    verdict = concluded(
        evidence,
        header,
        [*checked.defects, *_nonfinite_mismatches(cells, model)],
        [*checked.undecided, *why_undecided(profile, header, model, observation, alpha, now)],
        profile,
        alpha,
        lambda calibrated: calibrated.score(judged),
    )
    calibration = verdict.calibration
    return replace(verdict, attribution=calibration.attribution(observation)) if calibration else verdict


def concluded(
    evidence: Verdict,
    header: Header,
    reasons: Sequence[Reason],
    undecided: Sequence[Reason],
    profile: Profile | None,
    alpha: float | None,
    score_of: Callable[[Profile], Score],
) -> Verdict:
    """Return the verdict on a run with this evidence: FAIL for `reasons` of exact checks whatever else, no
    decision for `undecided`, else what `profile` makes of the score."""
    observation = evidence.observation
    if profile is None or undecided or observation is None:
        status: Status = "FAIL" if reasons else "INCONCLUSIVE"
        return replace(evidence, status=status, reasons=tuple(reasons or undecided))
    alpha = level(alpha, profile)
    limit = min(header.sampling.max_new_tokens - 1, profile.generated_positions[1])
    score, unlike = score_of(profile), None
    if ROUNDING.name in observation.series:
        unlike = profile.unlike_p_value(observation, limit)
    ranked = partial(profile.ranked, limit=limit, positions=observation.tokens - 1)
    counted = ranked(score.value)
    refusal = profile.refusal(counted, limit)
    if unlike is not None and unlike <= UNLIKE and score.value < FAR:
        sentence = "the text's rounding noise is unlike that of the calibration texts"
        undecided = [Reason("unlike-calibration", f"{sentence} (p {unlike:.2g})")]
    elif refusal <= alpha:
        refused = [name for name, z in score.detectors.items() if profile.refusal(ranked(z), limit) <= alpha]
        reasons = [*reasons, *_unlike_honest_runs(score, refused)]
    return replace(
        evidence,
        status="FAIL" if reasons else "INCONCLUSIVE" if undecided else "PASS",
        reasons=tuple(reasons or undecided or [Reason("as-honest", _as_honest(header))]),
        p_value=None if undecided else profile.p_value(counted, limit),
        refusal=refusal,
        unlike=unlike,
        score=score,
        ranked=counted,
        alpha=alpha,
        profile=profile.digest,
        n_calibration=profile.n,
        limit=limit,
        trace=digest_json(header.model_dump(mode="json")),
        calibration=profile,
    )


def level(alpha: float | None, profile: Profile) -> float:
    """Return the false-positive rate of a verdict: the profile's, where no other is asked for. Raises
    BitassayError for one that is not between 0 and 1."""
    return profile.alpha if alpha is None else checked_alpha(alpha)


def _format(model: PreTrainedModel) -> str:
    return FORMAT_OF_DTYPE[str(model.dtype).removeprefix("torch.")]


def profile_for(header: Header, model: PreTrainedModel) -> Profile | None:
    """Return the profile in the cache folder for what `header` claims and the verifier's own `model`; None
    where there is none."""
    return find_profile(ModelClaim.of(identity(model)), header.numerics, numerics(model), header.sampling)


def why_undecided(
    profile: Profile | None,
    header: Header,
    model: PreTrainedModel,
    observation: Observation,
    alpha: float | None = None,
    now: datetime | None = None,
) -> list[Reason]:
    """Return why `profile` cannot decide on this run; empty where it can."""
    claim, here = ModelClaim.of(identity(model)), numerics(model)
    if profile is None:
        pair = f"prover {header.numerics} and verifier {here}"
        sentence = f"no calibration profile for {claim.name} with {pair}; run bitassay calibrate"
        return [Reason("no-profile", sentence)]
    reasons: dict[str, str] = {}
    counts = {name: len(curves) for name, curves in profile.fits.items() if name != STATES}
    if not profile.model.is_same_model(claim):
        other = f"the profile is of {profile.model.name}, another model or recipe"
        reasons["profile-other-model"] = other
    elif profile.key != profile_key(profile.model, header.numerics, here, header.sampling):
        pairs = (("prover", profile.prover, header.numerics), ("verifier", profile.verifier, here))
        differ = [f"{side} {theirs} instead of {ours}" for side, ours, theirs in pairs if ours != theirs]
        other = f"the profile is of other runs: {'; '.join(differ) or 'another sampler'}"
        reasons["profile-other-numerics"] = other
    elif profile.model.config_digest and not header.model.config_digest:
        sentence = "the trace does not say with which configuration; an older profile can decide on it"
        reasons["no-configuration"] = sentence
    elif profile.layers != header.layers:
        reasons["profile-other-model"] = f"the profile is of layers {list(profile.layers)}"
    elif wrong := [
        name for name, n in counts.items() if len(observation.series.get(name) or ()) not in (0, n)
    ]:
        reasons["profile-other-detector"] = f"the profile is of another version of {wrong[0]}"
    low_rate, _ = profile.held_out.interval
    if low_rate > profile.alpha:
        sentence = f"it refused {profile.held_out.rejected} of {profile.held_out.n} held-out honest runs"
        reasons["profile-misfit"] = f"the profile does not hold what it promises: {sentence}"
    if profile.expired(now):
        sentence = f"the profile expired on {profile.expires:%Y-%m-%d}; run bitassay calibrate again"
        reasons["profile-expired"] = sentence
    (low, high), generated = profile.generated_positions, observation.tokens - 1
    calibrated = f"generated positions; the profile was calibrated on {low} to {high}"
    if observation.positions < low:
        reasons["too-few-tokens"] = f"{observation.positions} {calibrated}"
    elif generated > high:
        reasons["beyond-profile"] = f"{generated} {calibrated}"
    alpha = level(alpha, profile)
    if profile.n < (needed := runs_needed(alpha, profile.guarantee)):
        guarantee = f"with the guarantee {profile.guarantee!r}"
        sentence = f"alpha {alpha:g} {guarantee} needs {needed} honest runs, the profile has {profile.n}"
        reasons["profile-too-small"] = sentence
    return [Reason(code, sentence) for code, sentence in reasons.items()]


def _as_honest(header: Header) -> str:
    sentence = "states and tokens are those of an honest run"
    if header.model.config_digest is None:
        sentence += "; the trace does not say with which configuration, as older ones do not"
    return sentence


def _nonfinite_mismatches(cells: CellStatistics, model: PreTrainedModel) -> list[Reason]:
    count = int(cells.refused.sum())
    sentence = f"in {count} cells a number is NaN or infinite on one side only in {_format(model)}"
    return [Reason("nonfinite-mismatch", sentence)] if count else []


def _unlike_honest_runs(score: Score, refused: Sequence[str]) -> list[Reason]:
    """Return how the `refused` parts of the evidence are unlike honest runs."""
    reasons = []
    for name in refused:
        value = score.detectors[name]
        if name in BY_LAYER:
            farthest = value == max(score.detectors.get(other, value) for other in BY_LAYER)
            where = f", {score.part} positions at layer {score.layer}" if farthest else ""
            sentence = f"hidden states are {value:.1f} sd farther off than honest ones ({name}{where})"
            reasons.append(Reason("states-too-far", sentence))
        elif name == HEAD:
            sentence = f"the host's own last states choose other tokens ({name}: {value:.1f} sd)"
            reasons.append(Reason("tokens-unlikely", sentence))
        elif name == ROTARY:
            sentence = f"hidden states lean towards another rotary base ({name}: {value:.1f} sd)"
            reasons.append(Reason("states-too-far", sentence))
        elif name in TOKEN_DETECTORS:
            sentence = f"this model would take other tokens ({name}: {value:.1f} sd worse than honest ones)"
            reasons.append(Reason("tokens-unlikely", sentence))
        else:
            sentence = f"{name} is {value:.1f} sd farther off than in honest runs"
            reasons.append(Reason("detector-unlikely", sentence))
    return reasons

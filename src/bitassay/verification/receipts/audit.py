"""The verdict on a receipt and on what was opened of it.

It needs the receipt (with the token ids), the challenge and the opening, not the trace: the verifier
prefills all tokens and compares the opened cells. The tokens are judged in full, the states by the mean over
opened positions. The calibration profile is that of whole traces, so it decides only if the opened
generated positions are at least as many as it was calibrated on, and the generated ones at most. And since a
mean over k of n positions spreads more than one over all, the verdict takes a lower bound of the latter,

    mean - 2 s sqrt((1 - k / n) / k),   s = min(standard deviation of the opened ones, sd_l sqrt(N))

(Cochran 1977, Sampling Techniques, theorem 2.2: a simple random sample without replacement). The cap keeps a
host from buying room by wildly uneven cells: over the calibration runs of up to N positions the means spread
by sd_l, so positions of honest runs spread by no more than sd_l sqrt(N). With k = n nothing is taken off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill
from bitassay.engines.engine import engine_of
from bitassay.models.identity import identity
from bitassay.verification.container import TraceError
from bitassay.verification.detectors.verillm import FORMAT_OF_DTYPE
from bitassay.verification.distance import distance_floor, relative_distances
from bitassay.verification.evidence import Evidence, layer_evidence, token_margins
from bitassay.verification.profile import Profile
from bitassay.verification.receipts.challenge import Challenge, opened_positions
from bitassay.verification.receipts.opening import Opening, check_opening
from bitassay.verification.receipts.receipt import Receipt, check_signature
from bitassay.verification.structure import Reason, Request, claim_defects, header_defects
from bitassay.verification.trace import Header, Trace
from bitassay.verification.verdict import Verdict, decide, profile_for


@dataclass(frozen=True)
class OpenedEvidence(Evidence):
    """opened: generated positions whose states are part of it."""

    opened: int = 0

    @property
    def n_generated(self) -> int:
        return self.opened


def verify_opening(
    receipt: Receipt,
    one: Challenge,
    opening: Opening,
    model: PreTrainedModel,
    *,
    signer: bytes | None,
    profile: Profile | None = None,
    alpha: float | None = None,
    request: Request | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Check a receipt and what was opened of it against the verifier's own `model`.

    one: the challenge that the verifier itself made. signer: the host's public key, as the verifier knows it
    from elsewhere; None: not known, and then there is neither a PASS nor a statistical FAIL, because anyone
    could have signed. profile: default, the one in the cache folder. request: what was asked for.
    """
    header, name = receipt.header, identity(model).name
    if defects := opening_defects(receipt, one, opening, model, signer):
        return Verdict("FAIL", tuple(defects), name, len(header.output_ids))
    (own,) = engine_of(model).prefill([header.prompt_ids], [header.output_ids], layers=header.layers)
    positions = opened_positions(one, header)
    evidence = opened_evidence(opening, header, positions, own, model.dtype)
    trace = Trace(header, {})  # its states were compared
    claims = claim_defects(trace, model, request or Request())
    if profile is None:
        profile = profile_for(header, model)
    cautious = evidence
    if profile is not None:
        cautious = lower_bound(evidence, opening, header, positions, own, profile, model.dtype)
    doubts = _doubts(receipt, signer, profile)
    verdict = decide(trace, model, cautious, claims, profile, alpha, now, doubts)
    return replace(verdict, evidence=evidence)


def opening_defects(
    receipt: Receipt, one: Challenge, opening: Opening, model: PreTrainedModel, signer: bytes | None
) -> list[Reason]:
    """Why what was opened cannot be compared with `model`'s states, or is not what `signer` committed to;
    empty where it can and is."""
    try:
        check_signature(receipt)
        if signer is not None and signer != receipt.key:
            raise TraceError("other-signer", f"signed by {receipt.key.hex()}, not {signer.hex()}")
        check_opening(opening, receipt, one)
    except TraceError as error:
        return [Reason(error.code, error.problem)]
    found = header_defects(receipt.header, model)
    hidden = next(iter(opening.states.values())).shape[1]
    if hidden != (own_hidden := model.config.get_text_config().hidden_size):
        found.append(Reason("wrong-hidden-size", f"states of {hidden} numbers, the model has {own_hidden}"))
    return found


def opened_evidence(
    opening: Opening, header: Header, positions: Sequence[int], own: Prefill, dtype: torch.dtype
) -> OpenedEvidence:
    """States at the opened positions against the verifier's own, and the margins of all tokens."""
    n_prompt, at = sum(position < len(header.prompt_ids) for position in positions), list(positions)
    layers = tuple(
        layer_evidence(layer, rows, own.states[layer][at], n_prompt, dtype)
        for layer, rows in opening.states.items()
    )
    format = FORMAT_OF_DTYPE[str(dtype).removeprefix("torch.")]
    return OpenedEvidence(layers, token_margins(header, own), format, len(positions) - n_prompt)


def lower_bound(
    evidence: OpenedEvidence,
    opening: Opening,
    header: Header,
    positions: Sequence[int],
    own: Prefill,
    profile: Profile,
    dtype: torch.dtype,
) -> OpenedEvidence:
    """`evidence` with the mean log distances that all positions have at least, but for chance."""
    n, n_prompt, floor = len(header.positions), len(header.prompt_ids), distance_floor(dtype)
    k_prompt = sum(position < n_prompt for position in positions)
    layers = []
    for one in evidence.layers:
        if one.layer not in profile.layers:
            return evidence  # another model's profile, which will not decide
        rows = opening.states[one.layer]
        logs = relative_distances(rows, own.states[one.layer][list(positions)]).clamp(min=floor).log()
        longest = profile.generated_positions[1]
        most = profile.layers[one.layer].at(longest)[1] * math.sqrt(longest)
        off = sampling_margin(logs[k_prompt:], n - n_prompt, most)
        generated = None if one.generated is None else one.generated - off
        prompt = one.prompt - sampling_margin(logs[:k_prompt], n_prompt, most)
        layers.append(replace(one, prompt=prompt, generated=generated))
    return replace(evidence, layers=tuple(layers))


def sampling_margin(values: Float[Tensor, " opened"], n: int, most: float) -> float:
    """Two standard errors of the mean of `values`, of which there are n in all; their standard deviation is
    taken as `most` where it is larger or there is but one."""
    k = len(values)
    if k == n:
        return 0.0
    s = min(float(values.std()), most) if k > 1 else most
    return 2 * s * math.sqrt((1 - k / n) / k)


def _doubts(receipt: Receipt, signer: bytes | None, profile: Profile | None) -> list[Reason]:
    found = []
    if signer is None:
        sentence = f"signed by {receipt.key.hex()}; nobody has said whose key that is"
        found.append(Reason("unknown-signer", sentence))
    if profile is not None and (n := len(receipt.header.output_ids) - 1) > profile.generated_positions[1]:
        high = profile.generated_positions[1]
        sentence = f"{n} generated positions; the profile was calibrated on at most {high}"
        found.append(Reason("beyond-profile", sentence))
    return found

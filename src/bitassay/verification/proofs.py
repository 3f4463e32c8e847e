"""The verdict on a receipt and its small proof alone: `verify_proof`.

The verifier computes the run's prefill, in its own dtype and in the next higher precision, and judges

    tokens     as of any trace: the receipt has them all
    states     by the projections of the proof (`detectors/small_proof.py`), at all generated positions

by a profile that `calibrate --detectors proof-8` (or proof-2) made. The score is the largest of these
statistics, and is ranked among the profile's honest scores, which are the largest of these and others: of an
honest run it is at most as bad, so that alpha holds, at the price of a little power.

Left out: prompt positions, the layers before the last, and Merkle proofs. What was committed to is not opened
here; a challenge may still ask for it.
"""

from datetime import datetime

from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill
from bitassay.models.identity import identity
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.excess_distance import ROUNDING
from bitassay.verification.detectors.registry import DETECTORS, TOKEN_DETECTORS
from bitassay.verification.detectors.small_proof import check_claimed
from bitassay.verification.observe import Observation, precise_prefills
from bitassay.verification.profile import Profile, Score
from bitassay.verification.receipts.proof import SignedProof, check_proof
from bitassay.verification.receipts.receipt import Receipt
from bitassay.verification.scores import standardise, statistics
from bitassay.verification.structure import Reason, Request, claim_defects, header_defects
from bitassay.verification.submissions import check_signer, unknown_signer
from bitassay.verification.trace import Header, TraceError
from bitassay.verification.verdict import Verdict
from bitassay.verification.verify import concluded, profile_for, why_undecided


def verify_proof(
    receipt: Receipt,
    signed: SignedProof,
    model: PreTrainedModel,
    *,
    signer: bytes | None,
    profile: Profile | None = None,
    alpha: float | None = None,
    request: Request | None = None,
    now: datetime | None = None,
) -> Verdict:
    """Return the verdict on a receipt by its small proof, without trace or opening.

    signer: the host's public key, as the verifier knows it from elsewhere; None: not known, and then there is
    neither a PASS nor a statistical FAIL. profile: default, the one in the cache folder; one that does not
    know proofs of this size leaves the verdict INCONCLUSIVE. request: what was asked for.
    """
    header, name, tokens = receipt.header, identity(model).name, len(receipt.header.output_ids)
    try:
        check_signer(receipt, signer)
        check_proof(signed, receipt)
    except TraceError as error:
        return Verdict("FAIL", (Reason(error.code, error.problem),), name, tokens)
    if defects := header_defects(header, model):
        return Verdict("FAIL", tuple(defects), name, tokens)
    reasons = list(claim_defects(header, model, request or Request()))
    profile = profile or profile_for(header, model)
    ((own, precise),) = precise_prefills([header], model)
    observation = observed(header, signed, own, precise, model)
    undecided = why_undecided(profile, header, model, observation, alpha, now)
    undecided = [*unknown_signer(receipt, signer), *undecided]
    proof = detector_of(signed, header)
    if profile is not None and proof not in profile.fits:
        sentence = f"the profile does not know {proof}; run bitassay calibrate --detectors {proof}"
        undecided.append(Reason("profile-other-detector", sentence))
    evidence = Verdict("INCONCLUSIVE", (), name, tokens, observation, n_prompt=len(header.prompt_ids))
    return concluded(
        evidence,
        header,
        reasons,
        undecided,
        profile,
        alpha,
        lambda calibrated: proof_score(observation, calibrated, proof),
    )


def detector_of(signed: SignedProof, header: Header) -> str:
    """Return the name of the detector that reads proofs of this size."""
    return f"proof-{signed.proof.size(len(header.positions) - len(header.prompt_ids))}"


def observed(
    header: Header, signed: SignedProof, own: Prefill, precise: Prefill, model: PreTrainedModel
) -> Observation:
    """Return the series of the tokens, of the text's rounding noise, and of the proof."""
    # The host has shown no states: these are the verifier's.
    shown = {layer: own.states[layer][list(header.positions)] for layer in header.layers}
    comparison = Comparison(header, header.positions, shown, own, model.dtype, precise)
    series = {name: DETECTORS[name].measure(comparison) for name in (*TOKEN_DETECTORS, ROUNDING.name)}
    series[detector_of(signed, header)] = (check_claimed(comparison, signed.proof, signed.commitment),)
    return Observation.of(comparison, series)


def proof_score(observation: Observation, profile: Profile, proof: str) -> Score:
    """Return the largest z of the tokens and the proof."""
    computed = statistics(observation, [*TOKEN_DETECTORS, proof])
    assert computed is not None
    return Score.of(standardise(computed, profile.fits, observation.tokens - 1), observation.layers)

"""All detectors by name: this package's own, then those of entry points in the group `bitassay.detectors`.

    detector             evidence a token                       source
    verillm-paper        full states at the sampled layers      arXiv 2509.24257; cells not accepted
    verillm-documents    the same                               the VeriLLM experiments' thresholds
    distance             the same                               mean log relative distance by layer
    excess-distance      the same                               the host's rounding error less one's own
    segment-distance     the same                               the same from each sampled layer to the next
    rotary-base          the same                               along what another rotary base would do
    head-margin          states of the last layer               tokens by the host's own last states
    token-flips, token-outlier                                  tokens in units of honest rounding noise
    rounding             nothing                                the noise of the text itself
    toploc               258 bytes for 32 tokens                arXiv 2501.16007, on the last sampled layer
    activation-difr      a few projected numbers                arXiv 2511.20621
    proof-2, proof-8     projections, by 4 bits each         less the verifier's own rounding error
    token-difr           nothing: ids, nonce and seed           arXiv 2511.20621
    structure            the header; receipt and opening        exact checks (`structure.py`): 0 or infinite

`DECIDING` are those on which verdicts rest; a profile may add others to them.
"""

from bitassay.registry import Registry
from bitassay.verification.detectors.activation_difr import ACTIVATION_DIFR
from bitassay.verification.detectors.detector import Detector
from bitassay.verification.detectors.distance import DISTANCE
from bitassay.verification.detectors.excess_distance import EXCESS_DISTANCE, ROUNDING
from bitassay.verification.detectors.head_margin import HEAD_MARGIN
from bitassay.verification.detectors.rotary_base import ROTARY_BASE
from bitassay.verification.detectors.segment_distance import SEGMENT_DISTANCE
from bitassay.verification.detectors.small_proof import SMALL_PROOFS
from bitassay.verification.detectors.token_difr import TOKEN_DIFR
from bitassay.verification.detectors.token_noise import TOKEN_FLIPS, TOKEN_OUTLIER
from bitassay.verification.detectors.toploc import TOPLOC
from bitassay.verification.detectors.verillm import VERILLM_DOCUMENTS, VERILLM_PAPER

# Exact checks (`structure.py`, `submissions.py`), which run before any prefill: one defect decides.
STRUCTURE = Detector("structure", "exact checks", lambda comparison, proof: (), smallest_sd=1.0, exact=True)
DETECTORS: Registry[Detector] = Registry(
    "detectors",
    {
        detector.name: detector
        for detector in (
            VERILLM_PAPER,
            VERILLM_DOCUMENTS,
            DISTANCE,
            EXCESS_DISTANCE,
            SEGMENT_DISTANCE,
            ROTARY_BASE,
            HEAD_MARGIN,
            TOPLOC,
            ACTIVATION_DIFR,
            TOKEN_DIFR,
            TOKEN_FLIPS,
            TOKEN_OUTLIER,
            ROUNDING,
            *SMALL_PROOFS,
            STRUCTURE,
        )
    },
)
STATES = EXCESS_DISTANCE.name
SEGMENTS = SEGMENT_DISTANCE.name
ROTARY = ROTARY_BASE.name
HEAD = HEAD_MARGIN.name
BY_LAYER = (STATES, SEGMENTS)
TOKEN_DETECTORS = (TOKEN_DIFR.name, TOKEN_FLIPS.name, TOKEN_OUTLIER.name)
DECIDING = (STATES, SEGMENTS, ROTARY, HEAD, *TOKEN_DETECTORS)

"""The host's rounding error in each stretch of layers, computed from the host's own states at its beginning.

The verifier replays the run in segments: from the embeddings to the first sampled layer, and from each
sampled layer to the next, where every segment reads the host's states x of the layer before it. Its own dtype
makes y of them, the next higher precision r. For each sampled layer the statistic of a run is

    mean over positions of  log(||x - r|| / ||r||) - log(||y - r|| / ||r||)

as in `excess_distance.py`, with the same floor. There x - r holds the rounding errors of all layers up to
this one; here it holds those of one segment. So a small change of one layer stands out from the noise of a
few layers, errors of different segments are independent, and the segment that fails says where the change is.

A host that passes may be off by a little in every segment; `excess_distance.py` sees what that adds up to.
A segment's attention reads all positions, so this needs the states of all: whole traces, not openings.
"""

from typing import Any

from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.detectors.distance import by_layer, commit, full_states
from bitassay.verification.detectors.excess_distance import rounding_distances


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the log of the host's distance less that of the verifier's own, one series a segment, by the
    layer at its end."""
    host, own = rounding_distances(comparison, comparison.replayed[:2])
    return by_layer(host.log() - own.log(), comparison.n_prompt)


SEGMENT_DISTANCE = Detector(
    "segment-distance",
    "the host's rounding error less the verifier's own, by segment of layers",
    check,
    prove=commit,
    whole=True,
    evidence_bytes=full_states,
)

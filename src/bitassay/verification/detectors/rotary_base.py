"""The host's rounding error along the direction in which another rotary base would take the states.

A rotary base that is 1 % too large moves the states of a short text by less than honest kernels differ from
each other, so no distance shows it. But the verifier can compute where to: in the replay of
`segment_distance.py`, with y in the verifier's dtype, r in the next higher precision and r' the same with a
base FACTOR times as large, the direction is d = r' - r. For each position c is the cosine

    c = <x - y, d> / (||x - y|| ||d||)

averaged over segments, and the statistic of a run is |sum of c| / sqrt(number of positions), over those of
prompt and output: rounding errors point anywhere, and a changed base points along d at every position, to one
side or the other. This is the matched filter of a known change (Kay 1998, Fundamentals of Statistical Signal
Processing II, chapter 4), with the noise of each position scaled to one. x - y and not x - r: what rounding
does to the angles themselves points along d too, on both sides alike.

A model without rotary embeddings has d = 0 and all numbers 0. Other changes that turn positions (a scaling of
the context, a wrong base) point along d as far as they are alike.
"""

from typing import Any

import torch

from bitassay.verification.detectors.detector import Comparison, Detector, Series, last
from bitassay.verification.detectors.distance import commit, full_states

FACTOR = 1.01


def check(comparison: Comparison, _: Any) -> list[Series]:
    """Return the statistic of all positions up to each generated one."""
    own, precise, turned = comparison.replayed
    by_segment, shown = [], list(comparison.positions)
    for layer in comparison.header.layers:
        r = precise.states[layer][shown]
        error = comparison.claimed[layer].to(r) - own.states[layer][shown].to(r)
        direction = turned.states[layer][shown] - r
        size = error.norm(dim=-1) * direction.norm(dim=-1)
        by_segment.append((error * direction).sum(-1) / size.clamp(min=torch.finfo(r.dtype).tiny))
    cosines = torch.stack(by_segment).mean(0).nan_to_num()  # what is not finite, `segment_distance.py` sees
    counts = torch.arange(1, len(cosines) + 1, device=cosines.device)
    sums = cosines.cumsum(0).abs() / counts.sqrt()
    return [Series(tuple(sums[comparison.n_prompt :].tolist()))]


ROTARY_BASE = Detector(
    "rotary-base",
    "the host's rounding error along what another rotary base would do",
    check,
    smallest_sd=0.01,
    statistic=last,
    prove=commit,
    whole=True,
    evidence_bytes=full_states,
)

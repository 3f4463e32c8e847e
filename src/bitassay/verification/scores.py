"""From observations to one score, and from the score to a p-value.

    z     = (statistic - mean(n)) / sd(n)        of each series, n generated positions
    score = max over all z
    p     = (1 + #{honest scores >= score}) / (n_scores + 1)

**Fit.** mean and sd are those of honest runs, and depend on n: a mean over few positions spreads more than
one over many, and few tokens rarely hold the one that loses. They are kept at some lengths and are linear in
log n between. No form such as sd^2 = a + b / n is assumed: distances follow it, but the log of a mean of rare
margins need not. Prompt positions are judged by the fit of the generated ones: an honest prefill is nearer to
the verifier's own than cached decoding is, at times equal to the last bit, which leaves no spread to
standardise by. So they never raise an honest score much, and wrong prompt states still do.

**Ranks.** The honest scores are of other runs than those of the fit. Then the score of one more honest run is
equally likely to take any rank among them, and P(p <= alpha) <= alpha whatever the distribution (split
conformal prediction: Vovk et al. 2005; Papadopoulos et al. 2002). One combined score instead of a Bonferroni
correction over several p-values halves the honest runs that a given alpha needs. `threshold` is the same rule
as a limit of the score: a quantile between two scores would lie lower and give no such bound.

**Guarantees.** That bound is an average over calibrations: of profiles of n honest scores at alpha = 1 / (n +
1), a third have a true rate above alpha (it is Beta(1, n) distributed). `guaranteed_p_value` is at most alpha
for more than a share alpha of honest runs in at most 5 % of calibrations. The first is the guarantee
"average", the second "conditional", which needs three times as many honest runs (299 for 1 %, not 99).

**Opened positions.** Where k of n positions are shown, their mean spreads more than one over all, so verdicts
use a lower bound of the latter (Cochran 1977, Sampling Techniques, theorem 2.2),

    mean - 2 s sqrt((1 - k / n) / k),   s = min(standard deviation of the opened ones, sd sqrt(N))

The cap keeps a host from buying room by wildly uneven cells: over honest runs of up to N positions the means
spread by sd, so their positions spread by no more than sd sqrt(N).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from pydantic import Field, model_validator
from scipy import stats

from bitassay.errors import BitassayError
from bitassay.record.schema import Fields
from bitassay.verification.detectors.detector import Part, Series
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.observe import Observation
from bitassay.verification.trace import TOKENS, Header

Guarantee = Literal["conditional", "average"]
CONFIDENCE = 0.95  # of the conditional guarantee
MAX_LENGTHS = 64  # a factor of sqrt(2) apart they reach from 1 to 2^31
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class Statistic(NamedTuple):
    """A number of one detector; `series` counts from 0."""

    detector: str
    series: int
    part: Part
    value: float


class Fit(Fields):
    """Mean and standard deviation of a statistic over honest runs, by `lengths`: generated positions,
    ascending."""

    lengths: tuple[Annotated[int, Field(ge=1, le=TOKENS)], ...] = Field(min_length=1, max_length=MAX_LENGTHS)
    mean: tuple[Finite, ...] = Field(max_length=MAX_LENGTHS)
    sd: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)], ...] = Field(
        max_length=MAX_LENGTHS
    )

    @model_validator(mode="after")
    def _is_a_curve(self) -> "Fit":
        if any(a >= b for a, b in pairwise(self.lengths)):
            raise ValueError("lengths are not ascending")
        if not len(self.lengths) == len(self.mean) == len(self.sd):
            raise ValueError("not one mean and one sd for each length")
        return self

    def at(self, n: int) -> tuple[float, float]:
        """Return mean and sd for `n` generated positions: linear in log n between the lengths, constant
        beyond."""
        at, lengths = math.log(n), np.log(self.lengths)
        return float(np.interp(at, lengths, self.mean)), float(np.interp(at, lengths, self.sd))

    def standardised(self, value: float, n: int) -> float:
        """Return (value - mean) / sd for `n` generated positions."""
        mean, sd = self.at(n)
        return (value - mean) / sd


Fits = Mapping[str, Sequence[Fit]]  # by detector, one a series


def statistics(
    observation: Observation,
    detectors: Sequence[str],
    positions: int | None = None,
    tokens: int | None = None,
) -> list[Statistic] | None:
    """Return the statistics of the first `positions` generated positions and `tokens` output tokens (default:
    of all); None where a detector sees nothing there. Detectors that need a whole run say nothing of a part
    of one."""
    positions = observation.positions if positions is None else positions
    tokens = observation.tokens if tokens is None else tokens
    computed: list[Statistic] = []
    for name in detectors:
        detector = DETECTORS[name]
        if detector.whole and name not in observation.series:
            continue
        if detector.exact:
            computed.append(Statistic(name, 0, "generated", math.inf if observation.defects else 0.0))
            continue
        parts = [detector.statistics(s, positions, tokens) for s in observation.series.get(name, ())]
        if not parts or any("generated" not in by_part for by_part in parts):
            return [statistic for statistic in computed if statistic.value == math.inf] or None
        for index, by_part in enumerate(parts):
            computed += [Statistic(name, index, part, value) for part, value in by_part.items()]
    return computed


def standardise(computed: Sequence[Statistic], fits: Fits, n: int) -> list[Statistic]:
    """Return each statistic as z, for a run of `n` generated positions."""
    return [
        Statistic(detector, series, part, fits[detector][series].standardised(value, n))
        for detector, series, part, value in computed
    ]


def score(computed: Sequence[Statistic] | None, fits: Fits, n: int) -> float:
    """Return the largest z: infinite for a defect that exact checks found, minus infinite where a detector
    sees nothing, so that blindness is never a detection."""
    if not computed:
        return -math.inf
    return max(statistic.value for statistic in standardise(computed, fits, n))


def p_value(value: float, honest: Sequence[float]) -> float:
    """Return the share of runs as bad or worse among the honest ones and this one."""
    return (1 + sum(other >= value for other in honest)) / (len(honest) + 1)


def ranked_alike(value: float, cut: Sequence[float], honest: Sequence[float]) -> float:
    """Return the score that ranks among `honest` as `value` does among `cut`, the same runs cut shorter; at
    most `value` itself."""
    below = sum(other < value for other in cut)
    return min(value, sorted(honest)[below]) if below < len(honest) else value


def guaranteed_p_value(value: float, honest: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Return an upper bound of the share of honest runs that are as bad or worse: one-sided Clopper-Pearson
    (Clopper and Pearson 1934). To refuse where it is at most alpha refuses more than a share alpha of honest
    runs with a probability of at most 1 - `confidence`, over calibrations."""
    worse = sum(other >= value for other in honest)
    return float(stats.beta.ppf(confidence, worse + 1, len(honest) - worse)) if worse < len(honest) else 1.0


def refusal(value: float, honest: Sequence[float], guarantee: Guarantee) -> float:
    """Return the smallest alpha at which a run of this score is refused."""
    return (p_value if guarantee == "average" else guaranteed_p_value)(value, honest)


def checked_alpha(alpha: float) -> float:
    """Return `alpha`. Raises BitassayError for what is no false-positive rate: NaN, and what is not above 0
    and at most 1."""
    if not 0 < alpha <= 1:
        raise BitassayError(f"a false-positive rate of {alpha} is not between 0 and 1", "0.01")
    return alpha


def threshold(honest: Float64[np.ndarray, " n"], alpha: float) -> float:
    """Return the score above which p <= alpha; infinite where there are too few honest scores."""
    if not 0 < alpha < 1:
        raise BitassayError(f"a false-positive rate of {alpha} is not between 0 and 1", "0.01")
    rank = max(math.ceil((len(honest) + 1) * (1 - alpha) - 1e-9), 1)
    return float(np.sort(honest)[rank - 1]) if rank <= len(honest) else math.inf


def runs_needed(alpha: float, guarantee: Guarantee = "average") -> int:
    """Return the number of honest scores without which nothing can be refused at `alpha`."""
    if guarantee == "average":
        return math.ceil(1 / alpha - 1e-9) - 1
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-alpha) - 1e-9)


def lower_bound(observation: Observation, header: Header, fits: Fits, longest: int) -> Observation:
    """Return the observation with statistics that all positions have at least, but for chance. longest:
    generated positions up to which `fits` were made."""
    n_prompt = len(header.prompt_ids)

    def lowered(values: Sequence[float], n: int, curve: Fit) -> tuple[float, ...]:
        margin = sampling_margin(values, n, curve.at(longest)[1] * math.sqrt(longest))
        return tuple(value - margin for value in values)

    series = dict(observation.series)
    for name, curves in fits.items():
        if name in series and not DETECTORS[name].by_token:
            series[name] = tuple(
                Series(
                    lowered(measured.values, len(header.positions) - n_prompt, curve),
                    lowered(measured.prompt, n_prompt, curve),
                )
                for measured, curve in zip(series[name], curves, strict=True)
            )
    return replace(observation, series=series)


def sampling_margin(values: Sequence[float], n: int, most: float) -> float:
    """Return two standard errors of the mean of `values`, of which there are n in all; their standard
    deviation is taken as `most` where it is larger or there is but one."""
    k = len(values)
    if k in (0, n):
        return 0.0
    s = min(float(np.std(values, ddof=1)), most) if k > 1 else most
    return 2 * s * math.sqrt((1 - k / n) / k)

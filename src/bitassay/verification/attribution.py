"""What the evidence fits best: the honest model, one of a library of suspects, or none of these.

x are the standardised statistics of a trace (`profile.library_statistics`: each layer's generated and prompt
positions, and the tokens), d numbers. A kind of run k is a Gaussian, fitted to runs of that kind that were
cut at the same length,

    D_k^2 = (x - m_k)' C_k^-1 (x - m_k)
    P(k | x) is proportional to exp(-(D_k^2 + log det C_k) / 2)      with equal priors
    C_k = (N S_k + d diag(S_k)) / (N + d) + SMALLEST_SD^2 I

S_k is the sample covariance of N runs. N is about as small as d^2, so it is drawn to its own diagonal as if
d runs without correlation had been seen (Friedman 1989, "Regularized Discriminant Analysis", with this
weight instead of one from cross-validation), and no spread is taken for smaller than SMALLEST_SD honest
standard deviations.

One of the known kinds always fits best, so the best fit must also be plausible: where its D^2 is beyond all
but a share alpha of what held-out runs had from their own kind, the answer is "none of these".

This names a suspicion and decides nothing. How often it was right on held-out runs stands in the library
(`confusion`). Suspects that are near each other share the posterior; a kind that is not in the library is
called by the name of its nearest neighbour if it is near.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from jaxtyping import Float64
from pydantic import Field, model_validator

from bitassay.record.schema import Fields

HONEST, NONE = "honest", "none of these"
SMALLEST_SD = 0.25
MAX_KINDS, MAX_LENGTHS = 64, 64
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**9)]
_Row = Annotated[tuple[_Finite, ...], Field(min_length=1, max_length=4096)]


class Gaussian(Fields):
    """Of one kind of run at one length: mean [d] and covariance [d, d], in honest standard deviations."""

    mean: _Row
    covariance: tuple[_Row, ...]

    @classmethod
    def fitted(cls, runs: Float64[np.ndarray, "N d"]) -> "Gaussian":
        """Return the Gaussian of at least two runs."""
        N, d = runs.shape
        S = np.atleast_2d(np.cov(runs, rowvar=False))
        C = (N * S + d * np.diag(np.diag(S))) / (N + d) + SMALLEST_SD**2 * np.eye(d)
        return cls(mean=tuple(runs.mean(0).tolist()), covariance=tuple(map(tuple, C.tolist())))

    @model_validator(mode="after")
    def _has_a_density(self) -> "Gaussian":
        if {len(row) for row in self.covariance} != {len(self.mean)} or len(self.covariance) != len(
            self.mean
        ):
            raise ValueError("the covariance is not square, or not of as many numbers as the mean")
        C = np.array(self.covariance)
        if not np.allclose(C, C.T):
            raise ValueError("the covariance is not symmetric")
        try:
            np.linalg.cholesky(C)
        except np.linalg.LinAlgError as error:
            raise ValueError("the covariance is not positive definite") from error
        return self

    def distance_squared(self, x: Float64[np.ndarray, " d"]) -> float:
        off = x - np.array(self.mean)
        return float(off @ np.linalg.solve(np.array(self.covariance), off))

    def log_density(self, x: Float64[np.ndarray, " d"]) -> float:
        """Return the log density at x, up to a constant that all kinds share."""
        return -(self.distance_squared(x) + float(np.linalg.slogdet(np.array(self.covariance))[1])) / 2


class Library(Fields):
    """lengths: generated positions at which runs were cut, ascending; the rest follows it. kinds: a Gaussian
    for each length, by name, HONEST among them. plausible: the largest D^2 that is not "none of these".
    confusion: of runs that took no part in the fit, at the last length: what they were, what they were
    called, how many."""

    lengths: tuple[Annotated[int, Field(ge=1, le=2**18)], ...] = Field(min_length=1, max_length=MAX_LENGTHS)
    kinds: Mapping[Name, tuple[Gaussian, ...]] = Field(min_length=2, max_length=MAX_KINDS)
    plausible: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    confusion: Mapping[Name, Mapping[Name | Annotated[str, Field(pattern=f"^{NONE}$")], _Count]]

    @model_validator(mode="after")
    def _fits_together(self) -> "Library":
        if any(a >= b for a, b in pairwise(self.lengths)):
            raise ValueError("lengths are not ascending")
        if {len(self.plausible), *map(len, self.kinds.values())} != {len(self.lengths)}:
            raise ValueError("not one Gaussian of each kind and one limit for each length")
        if len({len(gaussian.mean) for several in self.kinds.values() for gaussian in several}) > 1:
            raise ValueError("Gaussians of different dimensions")
        if HONEST not in self.kinds:
            raise ValueError(f"no kind {HONEST!r}")
        known = set(self.kinds)
        if set(self.confusion) != known or any(set(row) - known - {NONE} for row in self.confusion.values()):
            raise ValueError("confusion of other kinds")
        return self

    @property
    def dimensions(self) -> int:
        return len(self.kinds[HONEST][0].mean)

    def length(self, n: int) -> int | None:
        """Return the longest of `lengths` that a run of `n` generated positions can be cut to; None: too
        short."""
        return max((length for length in self.lengths if length <= n), default=None)

    def attribute(self, x: Float64[np.ndarray, " d"], length: int) -> "Attribution":
        """Return what `x`, the statistics of a run cut at `length`, fits best."""
        at = self.lengths.index(length)
        kinds = {name: several[at] for name, several in self.kinds.items()}
        return attribute(x, kinds, self.plausible[at], length)


@dataclass(frozen=True)
class Attribution:
    """best: a kind of the library, or NONE. probability: of the kind that fits best, among those known.
    distance: D of it, plausible: the largest D that counts as that kind. length: generated positions used."""

    best: str
    probability: float
    posterior: Mapping[str, float]
    distance: float
    plausible: float
    length: int

    def __str__(self) -> str:
        return self.best if self.best == NONE else f"{self.best} ({self.probability:.2f})"


def attribute(
    x: Float64[np.ndarray, " d"], kinds: Mapping[str, Gaussian], plausible: float, length: int
) -> Attribution:
    """Return the posterior over `kinds` for the statistics `x`; plausible: the largest D^2."""
    logs = np.array([gaussian.log_density(x) for gaussian in kinds.values()])
    posterior = dict(zip(kinds, np.exp(logs - np.logaddexp.reduce(logs)).tolist(), strict=True))
    nearest = max(posterior, key=posterior.__getitem__)
    distance = kinds[nearest].distance_squared(x)
    best = nearest if distance <= plausible else NONE
    return Attribution(best, posterior[nearest], posterior, math.sqrt(distance), math.sqrt(plausible), length)


def fit_library(
    fit: Mapping[str, Mapping[int, Float64[np.ndarray, "fitted d"]]],
    held_out: Mapping[str, Mapping[int, Float64[np.ndarray, "held_out d"]]],
    alpha: float,
) -> Library:
    """Return a library from statistics of runs by kind and length, HONEST first; all kinds at the same
    lengths."""
    lengths = tuple(fit[HONEST])
    kinds = {name: tuple(Gaussian.fitted(runs[n]) for n in lengths) for name, runs in fit.items()}
    plausible = tuple(
        _quantile(
            [kinds[name][at].distance_squared(x) for name, runs in held_out.items() for x in runs[n]], alpha
        )
        for at, n in enumerate(lengths)
    )
    library = Library(
        lengths=lengths,
        kinds=kinds,
        plausible=plausible,
        confusion={name: dict.fromkeys((*kinds, NONE), 0) for name in kinds},
    )
    called = {
        name: [library.attribute(x, lengths[-1]).best for x in runs[lengths[-1]]]
        for name, runs in held_out.items()
    }
    confusion = {name: {to: called[name].count(to) for to in (*kinds, NONE)} for name in kinds}
    return library.model_copy(update={"confusion": confusion})


def _quantile(values: Sequence[float], alpha: float) -> float:
    """Return what one more such value exceeds with a probability of at most `alpha`; the largest where there
    are too few to say."""
    rank = math.ceil((1 - alpha) * (len(values) + 1))
    return sorted(values)[min(rank, len(values)) - 1]

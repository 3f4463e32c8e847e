"""A recipe's `replication`: which decoder layers run more than once, how, and what differs between the runs.

    serial     x_i = a_i x_(i-1) + c_i f_i(x_(i-1))         i = 1 ... n passes, one after the other
    parallel   x'  = a x + sum_i c_i f_i(x)                 all from the same state

with f_i(x) = layer_i(x) - x, what the i-th copy adds to its input. `coefficients` says what a and c are:

    plain      a = 1, c = 1                 another pass is another layer; parallel, a sum
    mean       a = 1, c = 1/n               serial: damped
    fitted     least squares on calibration text against the unquantized model's states; with one copy, the
               layer once and rescaled
    [0.7, 0.3] a = 1, and each copy's c

`of: linear` copies single matrices instead of layers. That is parallel by nature, and nothing but one linear
whose weight is `sum_i c_i W_i`: it is stored and run as that (`codes/copies.py`), at no cost at run time.

`of: block` runs the listed layers, which follow each other, as one, then again, with a and c around them all:
a loop over a block, as looped transformers have it (2605.23872 damps one without training).

`differ` says what sets the copies apart; with `nothing` and `inputs` they share their codes, stored once:

    nothing    the same codes again
    scale, clip, offset, noise   the grid's scale times values[i]; clipped at the percentile values[i]; moved
               by values[i] of a step (default: i/n); noise of values[i] steps
    seed       rounded stochastically, each copy by a seed of its own
    rotation   each copy is rounded after a rotation of its inputs of its own, and turned back
    residual   copy i is what the copies before it left over (linears, summed); values: scale factors
    digits     copy i is digit i of the codes of one grid of all copies' bits (linears, summed)
    inputs     the grid of the rounded inputs (`activations`) moved by (i + 1/2) / n - 1/2 steps

Layers count from 0. `by` error, kl and massive choose that share of the layers whose weights, whose
next-token distributions, or whose largest hidden states suffer (`select.py`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from pydantic import ConfigDict, Field, model_validator

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.spec import Spec, validate_as
from bitassay.quantization.recipe.weights import SUMS, Copies

SHARED = ("nothing", "inputs")  # what differs leaves codes as they are


class Chosen(Spec):
    """The share of the layers that need it most, and what says so."""

    by: Literal["error", "kl", "massive"]
    share: float = Field(default=0.3, gt=0, le=1)

    def count(self, layers: int) -> int:
        """How many of so many layers."""
        return max(1, math.floor(self.share * layers + 0.5))


class Between(Spec):
    """The layers between two shares of the depth, at least one of them."""

    start: float = Field(ge=0, lt=1)
    end: float = Field(gt=0, le=1)

    def of(self, layers: int) -> range:
        """Their numbers, of so many layers."""
        first = min(layers - 1, math.floor(self.start * layers + 0.5))
        return range(first, max(first + 1, math.floor(self.end * layers + 0.5)))


class Stop(Spec):
    """When a token needs no further pass: its state was turned by at most `cosine` (1 - cos) and changed by
    at most `norm` of its length. budget: passes beyond the first ones that a token gets over all layers."""

    cosine: float = Field(default=1e-3, ge=0, le=2)
    norm: float = Field(default=0.05, ge=0)
    budget: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class Steps:
    """The coefficients of one layer's passes. keep: a_i; of parallel copies the first alone counts. add:
    c_i."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    keep: tuple[float, ...]
    add: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.keep) == len(self.add) >= 1:
            raise ValueError(f"{len(self.keep)} and {len(self.add)} coefficients for the same passes")
        if not all(map(math.isfinite, (*self.keep, *self.add))):
            raise ValueError("a coefficient is not finite")

    @property
    def count(self) -> int:
        return len(self.add)


class ReplicationPlan(Spec):
    """What is run how often. copies counts the original: with 1 nothing changes, but for fitted coefficients,
    which rescale what the layer puts out. layers: all; progressive, from `copies` at the front down to one at
    the back; middle, the third of them there; between two shares of the depth; chosen by a measure; numbers;
    or a count for each, the largest of which is `copies`."""

    copies: int = Field(default=2, ge=1, le=16)
    layers: Literal["all", "progressive", "middle"] | Between | Chosen | tuple[int, ...] | dict[int, int] = (
        "all"
    )
    how: Literal["serial", "parallel"] = "serial"
    of: Literal["layer", "linear", "block"] = "layer"
    coefficients: Literal["plain", "mean", "fitted"] | tuple[float, ...]
    differ: Literal[
        "nothing", "scale", "clip", "offset", "noise", "seed", "rotation", "residual", "digits", "inputs"
    ] = "nothing"
    values: tuple[float, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**31)
    stop: Stop | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        mean = given.get("how") == "parallel" and given.get("differ") not in SUMS
        usual: dict[str, Any] = {"coefficients": "mean" if mean else "plain"}
        if isinstance(given.get("coefficients"), (list, tuple)):
            usual["copies"] = len(given["coefficients"])
        elif _are_counts(layers := given.get("layers")):
            usual["copies"] = max(layers.values())
        return usual | given

    @model_validator(mode="after")
    def _makes_sense(self) -> "ReplicationPlan":
        for wrong, why in _contradictions(self):
            if wrong:
                raise ValueError(why)
        if self.copies > 1 and self.differ not in SHARED:
            self.of_matrices(self.copies)
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether it takes text to carry it out."""
        chosen = self.layers
        return self.coefficients == "fitted" or (isinstance(chosen, Chosen) and chosen.by != "error")

    @property
    def changes_nothing(self) -> bool:
        """Whether every layer runs once, as it is."""
        return self.copies == 1 and self.coefficients != "fitted"

    @property
    def at_run_time(self) -> bool:
        """Whether layers have passes; else all copies are merged."""
        return self.of != "linear" and not self.changes_nothing

    @property
    def is_deeper_model(self) -> bool:
        """Whether it is the same as a model with more layers."""
        return (
            (self.how, self.of) == ("serial", "layer")
            and self.coefficients == "plain"
            and self.stop is None
            and self.differ != "inputs"
        )

    @property
    def makes_codes(self) -> bool:
        """Whether copies have codes of their own."""
        return self.copies > 1 and self.differ not in SHARED

    def of_matrices(self, count: int) -> Copies:
        """How `count` copies of a matrix differ."""
        assert self.differ not in SHARED
        given = self.coefficients if isinstance(self.coefficients, tuple) else None
        if self.coefficients == "plain" and self.differ not in SUMS and self.of == "linear":
            given = (1.0,) * count
        return validate_as(
            Copies,
            {
                "count": count,
                "differ": self.differ,
                "values": self.values,
                "coefficients": given,
                "seed": self.seed,
            },
        )

    def steps(self, count: int) -> Steps:
        """The coefficients of a layer's `count` passes, but for fitted ones."""
        assert self.coefficients != "fitted"
        add = self.coefficients
        if not isinstance(add, tuple):
            add = (1.0 if add == "plain" else 1 / count,) * count
        return Steps((1.0,) * count, add)

    def known_counts(self, layers: int) -> dict[int, int] | None:
        """How many copies each layer has that has several, or that is rescaled, in a model of so many layers;
        None where it takes a measurement. Raises BitassayError for a layer that the model does not have."""
        if isinstance(self.layers, Chosen):
            return None
        if self.layers == "all":
            counts = dict.fromkeys(range(layers), self.copies)
        elif self.layers == "middle":
            counts = dict.fromkeys(range(layers // 3, layers - layers // 3), self.copies)
        elif isinstance(self.layers, Between):
            counts = dict.fromkeys(self.layers.of(layers), self.copies)
        elif self.layers == "progressive":
            last = max(1, layers - 1)
            counts = {index: 1 + round((self.copies - 1) * (1 - index / last)) for index in range(layers)}
        elif isinstance(self.layers, dict):
            counts = self.layers
        else:
            counts = dict.fromkeys(self.layers, self.copies)
        if wrong := [index for index in counts if not 0 <= index < layers]:
            raise BitassayError(
                f"replication: there is no layer {wrong[0]}", f"layers from 0 to {layers - 1}"
            )
        least = 1 if self.copies == 1 and not self.changes_nothing else 2
        return {index: count for index, count in sorted(counts.items()) if count >= least}

    def counts(self, layers: int) -> list[int]:
        """How many copies each layer has; where layers are chosen by a measure, as many of the first."""
        if isinstance(self.layers, Chosen):
            several = self.layers.count(layers)
            return [self.copies] * several + [1] * (layers - several)
        known = self.known_counts(layers)
        assert known is not None
        return [known.get(index, 1) for index in range(layers)]


def _are_counts(layers: object) -> TypeGuard[dict[Any, int]]:
    if not isinstance(layers, dict) or not layers:
        return False
    return all(str(layer).isdecimal() and type(count) is int for layer, count in layers.items())


def _follow_each_other(layers: object) -> bool:
    if not isinstance(layers, tuple):
        return layers in ("all", "middle") or isinstance(layers, Between)
    return bool(layers) and sorted(layers) == list(range(min(layers), max(layers) + 1))


def _contradictions(p: ReplicationPlan) -> list[tuple[bool, str]]:
    """Combinations that make no sense, and why."""
    counts = p.layers.values() if isinstance(p.layers, dict) else ()
    varied = p.layers == "progressive" or isinstance(p.layers, dict)
    listed = isinstance(p.coefficients, tuple)
    whole_first = (
        p.coefficients[:1] == (1,) if isinstance(p.coefficients, tuple) else p.coefficients == "plain"
    )
    return [
        (
            p.of == "linear" and p.how == "serial",
            "a linear cannot follow itself: of: linear needs how: parallel",
        ),
        (
            p.how == "parallel" and p.differ == "nothing" and p.copies > 1,
            "parallel copies that share everything say the same: nothing would change but the sum's size",
        ),
        (
            p.differ in SUMS and (p.how, p.of, p.coefficients) != ("parallel", "linear", "plain"),
            f"{p.differ}: what a copy leaves over is no layer by itself: how: parallel, of: linear, "
            "coefficients: plain",
        ),
        (
            p.of == "block"
            and ((p.how, p.differ, p.stop) != ("serial", "nothing", None) or p.coefficients == "fitted"),
            "a block runs again as it is: how: serial, differ: nothing, no stop, coefficients that are given",
        ),
        (
            p.of == "block" and not _follow_each_other(p.layers),
            "of: block: layers: all, middle, between two shares, or a list of layers that follow each other",
        ),
        (
            p.of == "linear" and p.coefficients == "fitted",
            "fitted coefficients are of layers, not of linears",
        ),
        (
            p.of == "linear" and p.differ == "inputs" and p.coefficients != "mean",
            "roundings of one input are averaged: of: linear with differ: inputs needs coefficients: mean",
        ),
        (
            p.stop is not None and p.how == "parallel",
            "stop: parallel copies all run at once; nothing can stop",
        ),
        (
            p.stop is not None and p.coefficients == "fitted",
            "stop: fitted coefficients are for all passes, not for the first few",
        ),
        (
            p.stop is not None and p.copies > 1 and not whole_first,
            "stop: a token may stop after the first pass, which must then be the whole layer: coefficients: "
            "plain, or a list that begins with 1",
        ),
        (listed and len(p.coefficients) != p.copies, f"coefficients: {p.copies} copies need as many"),
        (
            varied and (listed or bool(p.values)),
            "layers with different counts cannot share a list of coefficients or values",
        ),
        (
            isinstance(p.layers, (tuple, dict))
            and (not p.layers or max(counts, default=p.copies) < p.copies),
            "layers: none of them has as many copies as there are to be",
        ),
        (
            isinstance(p.layers, tuple) and len(set(p.layers)) < len(p.layers),
            "layers: one is listed twice; how many copies each has is said by {3: 2, 4: 3}",
        ),
        (
            isinstance(p.layers, Between) and p.layers.start >= p.layers.end,
            "layers: start is a smaller share of the depth than end",
        ),
        (bool(counts) and not 1 <= min(counts) <= max(counts) <= 16, "layers: counts are from 1 to 16"),
        (bool(counts) and max(counts, default=1) > p.copies, "layers: a count is above copies, its maximum"),
        (bool(p.values) and p.differ in SHARED, f"values: copies that differ by {p.differ} have none"),
    ]

"""A recipe's `replication`: which decoder layers run more than once, how, and what differs between the runs.

    serial     x_i = a_i x_(i-1) + c_i f_i(x_(i-1))         i = 1 ... n passes, one after the other
    parallel   x'  = a x + sum_i c_i f_i(x)                 all from the same state

with f_i(x) = layer_i(x) - x, what the i-th copy adds to its input. a is 1, but for `fitted` coefficients; c
is 1 (`plain`), 1/n (`mean`), fitted to the unquantized model's states (`fit.py`), or a list.

`of: linear` copies single matrices instead of layers. That is parallel by nature, and nothing but one linear
whose weight is `sum_i c_i W_i`: it is stored and run as that (`codes/copies.py`), at no cost at run time.
`of: block` runs the listed layers, which follow each other, as one, then again, with a and c around them all:
a loop over a block, as looped transformers have it (2605.23872 damps one without training).

Copies that differ by `nothing` share their codes, stored once; so do those of `inputs`, which move the grid
of rounded inputs by (i + 1/2) / n - 1/2 steps. How others differ `Copies` says (`weights.py`). Layers count
from 0; those that a measure chooses `select.py` finds. docs/replication.md describes every field.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from pydantic import ConfigDict, Field, model_validator

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.spec import RecipePart, Spec, validate_as
from bitassay.quantization.recipe.weights import SUMS, Copies

if TYPE_CHECKING:
    from bitassay.quantization.recipe.recipe import Recipe

SHARED = ("nothing", "inputs")  # what differs leaves codes as they are


class Chosen(Spec):
    """The share of the layers that need it most, and what says so."""

    by: Literal["error", "kl", "massive"]
    share: float = Field(default=0.3, gt=0, le=1)

    def count(self, layers: int) -> int:
        """Return how many of `layers` layers are chosen."""
        return max(1, math.floor(self.share * layers + 0.5))


class Between(Spec):
    """The layers between two shares of the depth, at least one of them."""

    start: float = Field(ge=0, lt=1)
    end: float = Field(gt=0, le=1)

    def of(self, layers: int) -> range:
        """Return the numbers of these layers, in a model of `layers` layers."""
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
    """The coefficients of one layer's passes. keep: a_i, of parallel copies the first alone; add: c_i."""

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


class ReplicationPlan(RecipePart):
    """What is run how often. copies counts the original: with 1 nothing changes, but for fitted coefficients,
    which rescale what the layer puts out; where `layers` has counts, it is the largest of them."""

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
    def _defaults(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        mean = fields.get("how") == "parallel" and fields.get("differ") not in SUMS
        usual: dict[str, Any] = {"coefficients": "mean" if mean else "plain"}
        if isinstance(fields.get("coefficients"), (list, tuple)):
            usual["copies"] = len(fields["coefficients"])
        elif _are_counts(layers := fields.get("layers")):
            usual["copies"] = max(layers.values())
        return usual | fields

    @property
    def needs_text(self) -> bool:
        chosen = self.layers
        return self.coefficients == "fitted" or (isinstance(chosen, Chosen) and chosen.by != "error")

    @property
    def measures_bits(self) -> bool:
        return self.makes_codes and isinstance(self.layers, Chosen)

    @property
    def changes_nothing(self) -> bool:
        """Whether every layer runs once, as it is."""
        return self.copies == 1 and self.coefficients != "fitted"

    @property
    def at_run_time(self) -> bool:
        """Whether layers have passes; else all copies are merged."""
        return self.of != "linear" and not self.changes_nothing

    @property
    def plain_obstacle(self) -> str | None:
        return "plain transformers would run each layer once" if self.at_run_time else None

    @property
    def is_deeper_model(self) -> bool:
        """Whether it is the same as a model with more layers."""
        plain = (self.how, self.of, self.coefficients, self.stop) == ("serial", "layer", "plain", None)
        return plain and self.differ != "inputs"

    @property
    def makes_codes(self) -> bool:
        """Whether copies have codes of their own."""
        return self.copies > 1 and self.differ not in SHARED

    @property
    def averages_inputs(self) -> bool:
        """Whether copies of linears differ by the grid of their inputs alone: roundings are averaged."""
        return (self.of, self.differ) == ("linear", "inputs")

    @property
    def needs_all_layers(self) -> str | None:
        """What of it needs all layers in memory at once; None where each can come and go."""
        if isinstance(self.layers, Chosen):
            return f"of layers chosen by {self.layers.by}"
        if self.coefficients == "fitted":
            return "with fitted coefficients"
        if self.of == "layer" and (self.makes_codes or self.differ == "inputs"):
            return "of layers whose copies differ"
        return None

    def changes_codes(self, recipe: "Recipe") -> bool:
        return self.makes_codes

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        inputs, schemes, rotation = recipe.activations, recipe.schemes, recipe.rotation
        if self.makes_codes and not schemes:
            yield "copies with codes of their own, and there are no weights to round"
        if isinstance(self.layers, Chosen) and self.layers.by != "massive" and not schemes:
            yield "layers are chosen by what quantizing their weights does, and there are no weights"
        fits_or_repeats = self.coefficients == "fitted" or self.of == "block"
        if fits_or_repeats and rotation is not None and rotation.r1 == "online":
            yield (
                "coefficients cannot be fitted, nor blocks repeated, where layers turn the stream: r1: folded"
            )
        if self.differ == "inputs" and (inputs is None or not inputs.has_steps):
            yield "copies that differ by inputs need activations rounded to integers"
        if self.makes_codes and not any(scheme.copies for scheme in schemes):
            for scheme in schemes:
                scheme.with_copies(self.of_matrices(self.copies))

    def of_matrices(self, count: int) -> Copies:
        """Return how `count` copies of a matrix differ."""
        assert self.differ not in SHARED
        coefficients = self.coefficients if isinstance(self.coefficients, tuple) else None
        if self.coefficients == "plain" and self.differ not in SUMS and self.of == "linear":
            coefficients = (1.0,) * count
        fields = {"count": count, "coefficients": coefficients}
        return validate_as(Copies, fields | self.model_dump(include={"differ", "values", "seed"}))

    def steps(self, count: int) -> Steps:
        """Return the coefficients of a layer's `count` passes, but for fitted ones."""
        assert self.coefficients != "fitted"
        add = self.coefficients
        if not isinstance(add, tuple):
            add = (1.0 if add == "plain" else 1 / count,) * count
        return Steps((1.0,) * count, add)

    def known_counts(self, layers: int) -> dict[int, int] | None:
        """Return the copies of each layer that has several, or is rescaled; None where that is measured.
        Raises BitassayError for a layer that the model does not have."""
        if isinstance(self.layers, Chosen):
            return None
        if isinstance(self.layers, dict):
            counts = self.layers
        elif self.layers == "progressive":
            last = max(1, layers - 1)
            counts = {index: 1 + round((self.copies - 1) * (1 - index / last)) for index in range(layers)}
        else:
            counts = dict.fromkeys(self._listed(layers), self.copies)
        if wrong := [index for index in counts if not 0 <= index < layers]:
            raise BitassayError(
                f"replication: there is no layer {wrong[0]}", f"layers from 0 to {layers - 1}"
            )
        least = 1 if self.copies == 1 and not self.changes_nothing else 2
        return {index: count for index, count in sorted(counts.items()) if count >= least}

    def _listed(self, layers: int) -> Iterable[int]:
        if isinstance(self.layers, Between):
            return self.layers.of(layers)
        if isinstance(self.layers, tuple):
            return self.layers
        return range(layers) if self.layers == "all" else range(layers // 3, layers - layers // 3)

    def counts(self, layers: int) -> list[int]:
        """Return how many copies each layer has; where layers are measured, as many of the first."""
        known = self.known_counts(layers)
        if known is None:
            assert isinstance(self.layers, Chosen)
            known = dict.fromkeys(range(self.layers.count(layers)), self.copies)
        return [known.get(index, 1) for index in range(layers)]

    def contradictions(self) -> Iterator[str]:
        fitted, shared = self.coefficients == "fitted", self.differ in SHARED
        first = self.coefficients[0:1] if isinstance(self.coefficients, tuple) else ()
        if self.of == "linear" and self.how == "serial":
            yield "a linear cannot follow itself: of: linear needs how: parallel"
        if self.how == "parallel" and self.differ == "nothing" and self.copies > 1:
            yield "parallel copies that share everything give the same: only the size of the sum would change"
        if self.differ in SUMS and (self.how, self.of, self.coefficients) != ("parallel", "linear", "plain"):
            yield (
                f"{self.differ}: what a copy leaves over is no layer by itself: how: parallel, of: linear, "
                "coefficients: plain"
            )
        as_it_is = (self.how, self.differ, self.stop) == ("serial", "nothing", None)
        if self.of == "block" and (not as_it_is or fitted):
            yield "a block runs again as it is: how: serial, differ: nothing, no stop, no fitted coefficients"
        if self.of == "block" and not _follow_each_other(self.layers):
            yield ("of: block: layers: all, middle, between two shares, or a list of neighbours")
        if self.of == "linear" and fitted:
            yield "fitted coefficients are of layers, not of linears"
        if self.averages_inputs and self.coefficients != "mean":
            yield (
                "roundings of one input are averaged: of: linear with differ: inputs needs coefficients: mean"
            )
        if self.stop is not None and self.how == "parallel":
            yield "stop: parallel copies all run at once; nothing can stop"
        if self.stop is not None and fitted:
            yield "stop: fitted coefficients are for all passes, not for the first few"
        if self.stop is not None and self.copies > 1 and self.coefficients != "plain" and first != (1,):
            yield (
                "stop: a token may stop after the first pass, which must then be the whole layer: "
                "coefficients: plain, or a list that begins with 1"
            )
        if isinstance(self.coefficients, tuple) and len(self.coefficients) != self.copies:
            yield f"coefficients: {self.copies} copies need as many"
        yield from self._contradictions_of_layers()
        if self.values and shared:
            yield f"values: copies that differ by {self.differ} have none"
        if self.makes_codes:
            self.of_matrices(self.copies)

    def _contradictions_of_layers(self) -> Iterator[str]:
        layers = self.layers
        counts = layers.values() if isinstance(layers, dict) else ()
        listed = isinstance(self.coefficients, tuple) or bool(self.values)
        if listed and (layers == "progressive" or isinstance(layers, dict)):
            yield "layers with different counts cannot share a list of coefficients or values"
        if isinstance(layers, (tuple, dict)) and (
            not layers or max(counts, default=self.copies) < self.copies
        ):
            yield "layers: none of them has as many copies as there are to be"
        if isinstance(layers, tuple) and len(set(layers)) < len(layers):
            yield "layers: one is listed twice; how many copies each has is said by {3: 2, 4: 3}"
        if isinstance(layers, Between) and layers.start >= layers.end:
            yield "layers: start is a smaller share of the depth than end"
        if counts and not 1 <= min(counts) <= max(counts) <= 16:
            yield "layers: counts are from 1 to 16"
        if counts and max(counts) > self.copies:
            yield "layers: a count is above copies, its maximum"


def _are_counts(layers: object) -> TypeGuard[dict[Any, int]]:
    if not isinstance(layers, dict) or not layers:
        return False
    return all(str(layer).isdecimal() and type(count) is int for layer, count in layers.items())


def _follow_each_other(layers: object) -> bool:
    if not isinstance(layers, tuple):
        return layers in ("all", "middle") or isinstance(layers, Between)
    return bool(layers) and sorted(layers) == list(range(min(layers), max(layers) + 1))

"""Specs of what changes a model before it is rounded: rotation and smoothing. The algorithms are
`transforms/`."""

from typing import Literal

from pydantic import Field, model_validator

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.spec import Spec

Place = Literal["norms", "values", "up", "inputs"]


class Rotation(Spec):
    """What to rotate, and how. `without_hadamard` says what a size gets that has no Hadamard matrix here:
    nothing but a refusal, a random orthogonal matrix, or Hadamard blocks along the diagonal. `rounds` is for
    `refined`."""

    kind: Literal["hadamard", "random-hadamard", "orthogonal", "refined"] = "random-hadamard"
    r1: Literal["folded", "online"] | None = "folded"
    r2: bool = True
    r4: bool = False
    layers: Literal["all", "none"] | tuple[int, ...] = "all"
    seed: int = 0
    without_hadamard: Literal["refuse", "orthogonal", "blocks"] = "refuse"
    rounds: int = Field(default=20, ge=1, le=1000)

    @model_validator(mode="after")
    def _makes_sense(self) -> "Rotation":
        if self.r1 is None and not self.r2 and not self.r4:
            raise ValueError("nothing to rotate: r1, r2 and r4 are all off")
        if self.r1 == "folded" and not isinstance(self.layers, str):
            raise ValueError(
                "folded r1 turns the residual stream of all layers: for chosen ones, r1: online or r1: null"
            )
        if self.kind == "refined" and self.r1 != "folded":
            raise ValueError(
                "refined is for r1: folded; what is applied at run time must follow from the seed"
            )
        return self

    @property
    def online(self) -> bool:
        """Whether the model needs products at run time, which no other engine knows of."""
        return self.layers != "none" and (self.r1 == "online" or self.r4)

    def chosen(self, count: int) -> list[int]:
        """The layers of a model that has `count`. Raises BitassayError for one that it does not have."""
        if isinstance(self.layers, str):
            return list(range(count)) if self.layers == "all" else []
        if wrong := [index for index in self.layers if not 0 <= index < count]:
            raise BitassayError(f"rotation: there is no layer {wrong[0]}", f"layers from 0 to {count - 1}")
        return sorted(set(self.layers))


class Smoothing(Spec):
    """How scales are chosen, and where they are folded. alpha is smoothquant's, exponents and clip are
    awq's."""

    method: Literal["smoothquant", "awq"]
    places: tuple[Place, ...] = ("norms", "values", "up")
    alpha: float = Field(default=0.5, ge=0, le=1)
    exponents: int = Field(default=20, ge=1, le=100)
    clip: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> "Smoothing":
        foreign = {"smoothquant": ("exponents", "clip"), "awq": ("alpha",)}[self.method]
        for name in foreign:
            if getattr(self, name) != Smoothing.model_fields[name].default:
                raise ValueError(f"{name} has no effect on method: {self.method}")
        if not self.places:
            raise ValueError("places is empty: there is nowhere to fold a scale")
        if self.at_run_time and len(self.places) > 1:
            raise ValueError("places: inputs gives every linear scales of its own, so it stands alone")
        return self

    @property
    def at_run_time(self) -> bool:
        """Whether inputs are divided as they are read, which other tools would leave out."""
        return "inputs" in self.places

"""Specs of what changes a model before it is rounded: rotation, smoothing. Algorithms: `transforms/`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from bitassay.errors import BitassayError
from bitassay.quantization.recipe.spec import RecipePart

if TYPE_CHECKING:
    from bitassay.quantization.recipe.recipe import Recipe

Place = Literal["norms", "values", "up", "inputs"]


class Rotation(RecipePart):
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

    def contradictions(self) -> Iterator[str]:
        if self.r1 is None and not self.r2 and not self.r4:
            yield "nothing to rotate: r1, r2 and r4 are all off"
        if self.r1 == "folded" and not isinstance(self.layers, str):
            yield "folded r1 turns the residual stream of all layers: for chosen ones, r1: online or r1: null"
        if self.kind == "refined" and self.r1 != "folded":
            yield "refined is for r1: folded; what is applied at run time must follow from the seed"

    @property
    def needs_text(self) -> bool:
        return self.kind == "refined"

    @property
    def online(self) -> bool:
        """Whether the model needs products at run time, which no other engine knows of."""
        return self.layers != "none" and (self.r1 == "online" or self.r4)

    @property
    def plain_obstacle(self) -> str | None:
        return "plain transformers would run the model without its part at run time" if self.online else None

    def chosen(self, count: int) -> list[int]:
        """Return the chosen ones of `count` layers. Raises BitassayError for one that is not there."""
        if isinstance(self.layers, str):
            return list(range(count)) if self.layers == "all" else []
        if wrong := [index for index in self.layers if not 0 <= index < count]:
            raise BitassayError(f"rotation: there is no layer {wrong[0]}", f"layers from 0 to {count - 1}")
        return sorted(set(self.layers))


class Smoothing(RecipePart):
    """How scales are chosen, and where they are folded. alpha is smoothquant's, exponents and clip awq's."""

    method: Literal["smoothquant", "awq"]
    places: tuple[Place, ...] = ("norms", "values", "up")
    alpha: float = Field(default=0.5, ge=0, le=1)
    exponents: int = Field(default=20, ge=1, le=100)
    clip: bool = False

    def contradictions(self) -> Iterator[str]:
        foreign = {"smoothquant": ("exponents", "clip"), "awq": ("alpha",)}[self.method]
        yield from self.idle(foreign, f"method: {self.method}")
        if not self.places:
            yield "places is empty: there is nowhere to fold a scale"
        if self.at_run_time and len(self.places) > 1:
            yield "places: inputs gives every linear scales of its own, so it stands alone"

    @property
    def needs_text(self) -> bool:
        return True

    @property
    def at_run_time(self) -> bool:
        """Whether linears divide their inputs as they read them."""
        return "inputs" in self.places

    @property
    def plain_obstacle(self) -> str | None:
        return "plain transformers would not divide inputs at run time" if self.at_run_time else None

    def conflicts(self, recipe: "Recipe") -> Iterator[str]:
        inputs = recipe.activations
        if self.method == "smoothquant" and (inputs is None or not inputs.schemes):
            yield "smoothquant makes inputs easier to round, and no activations are rounded"
        if self.method == "awq" and not recipe.schemes:
            yield "awq makes weights easier to round, and there are none"
        if self.clip and any("adaptive" in scheme.granularity for scheme in recipe.schemes):
            yield "clip looks at groups, and adaptive ones are chosen after it"

"""Calibration text: what the calibrated methods look at while they quantize.

Windows evenly spaced over a text: 128 of 512 tokens of C4 are what AutoRound takes by default, and enough for
GPTQ. A text of one's own should be what the model is used for, and none that quality is measured on.
"""

from typing import Any, Literal

from pydantic import Field, field_validator
from transformers import PreTrainedModel

from bitassay.data.corpora import is_pinned, pinned
from bitassay.data.windows import Protocol, TooShortError
from bitassay.errors import BitassayError
from bitassay.models.positions import context_length, model_windows
from bitassay.quantization.recipe.spec import Spec
from bitassay.quantization.shapes import Tokens

UNTRUSTED = "untrusted"  # of a recipe that is validated: it may not make us look at files


class Calibration(Spec):
    """`samples` windows of `tokens` tokens of a corpus; a file of one's own (`corpora.py`) is in the recipe's
    id by its digest. every_expert: show every token to every expert of a mixture, not only to those that its
    router chooses. precision: what the layers' products are computed in while the text runs through them,
    where that is not the model's dtype; what is solved stays in float32."""

    corpus: str = "c4-train"
    samples: int = Field(default=128, ge=1)
    tokens: int = Field(default=512, ge=2)
    every_expert: bool = False
    precision: Literal["bfloat16"] | None = None

    @field_validator("corpus")
    @classmethod
    def _with_digest(cls, name: str, info: Any) -> str:
        if info.context == UNTRUSTED and not is_pinned(name):
            raise ValueError(f"{name} is without its digest")
        return pinned(name)


def check_calibration(model: PreTrainedModel, spec: Calibration) -> None:
    """Refuse no samples, and samples that are longer than what the model reads."""
    places = context_length(model)
    if places is not None and spec.tokens > places:
        raise BitassayError(
            f"calibration: samples of {spec.tokens} tokens, and the model reads {places}", f"tokens: {places}"
        )
    if spec.samples < 1:  # a copy of a spec is not validated
        raise BitassayError(f"calibration: {spec.samples} samples", "samples: 1 or more")


def calibration_tokens(model: PreTrainedModel, spec: Calibration) -> Tokens:
    """Return the windows as token ids. Raises BitassayError for an unknown or too short corpus."""
    check_calibration(model, spec)
    protocol = Protocol(spec.corpus, window_tokens=spec.tokens, windows=spec.samples)
    try:
        return model_windows(model, protocol)[0]
    except TooShortError as error:
        raise BitassayError(
            f"calibration: {error.problem}", "fewer samples or fewer tokens, or a longer text"
        ) from error

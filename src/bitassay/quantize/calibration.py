"""Calibration text: what the calibrated methods look at while they quantize.

Windows evenly spaced over a text: 128 of 512 tokens of C4 are what AutoRound takes by default, and enough for
GPTQ. A text of one's own should be what the model is used for, and none that quality is measured on.
"""

from typing import Any, Literal

from jaxtyping import Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.data.corpora import is_pinned, pinned
from bitassay.data.windows import Protocol, token_windows
from bitassay.models.load import tokenizer
from bitassay.quantize.scheme import Part

UNTRUSTED = "untrusted"  # of a recipe that is validated: it may not make us look at files


class Calibration(Part):
    """`samples` windows of `tokens` tokens of a corpus; a file of one's own (`corpora.py`) is in the recipe's
    id by its digest. pieces: how many texts of their own each window is cut into: a model treats the first
    tokens of a text unlike all others, and sees more of them so. every_expert: show every token to every
    expert of a mixture, not only to those that its router chooses. precision: what the layers' products are
    computed in while the text runs through them, where that is not the model's dtype; what is solved stays in
    float32."""

    corpus: str = "c4-train"
    samples: int = Field(default=128, ge=1)
    tokens: int = Field(default=512, ge=2)
    pieces: int | None = Field(default=None, ge=1)
    every_expert: bool = False
    precision: Literal["bfloat16"] | None = None

    @model_validator(mode="after")
    def _whole_pieces(self) -> "Calibration":
        pieces = self.pieces or 1
        if self.tokens % pieces or self.tokens < 2 * pieces:
            raise ValueError(f"{self.tokens} tokens cannot be cut into {pieces} equal pieces of two or more")
        return self

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return self.tokens // (self.pieces or 1)

    @field_validator("corpus")
    @classmethod
    def _with_digest(cls, name: str, info: Any) -> str:
        if info.context == UNTRUSTED and not is_pinned(name):
            raise ValueError(f"{name} is without its digest")
        return pinned(name)


def calibration_tokens(model: PreTrainedModel, spec: Calibration) -> Int[Tensor, "texts tokens"]:
    """The windows, or the pieces of them, as the model's token ids. Raises BitassayError where the corpus is
    unknown or too short."""
    protocol = Protocol(spec.corpus, window_tokens=spec.tokens, windows=spec.samples)
    return token_windows(tokenizer(model), protocol)[0].reshape(-1, spec.length)

"""A protocol's windows as a model reads them: its tokens, and no more of them than it has positions."""

from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.data.windows import Protocol, token_windows
from bitassay.models.config import read_config
from bitassay.models.identity import tokenizer
from bitassay.models.positions import check_window, context_length, positions_of


def model_windows(model: PreTrainedModel, protocol: Protocol) -> tuple[Int[Tensor, "windows tokens"], str]:
    """`token_windows` of the model's tokenizer. Raises BitassayError for windows that are longer than what
    the model reads."""
    check_protocol(model, protocol)
    return token_windows(tokenizer(model), protocol)


def check_protocol(model: PreTrainedModel, protocol: Protocol) -> None:
    """Refuse windows that are longer than what the model reads."""
    check_window(context_length(model), protocol.window_tokens, protocol.id)


def check_folder(folder: Path, protocol: Protocol, *, trust_remote_code: bool = False) -> None:
    """`check_protocol` for a model that is not loaded yet. Raises BitassayError for a config.json that is not
    read, too."""
    check_window(_positions(folder, trust_remote_code), protocol.window_tokens, protocol.id)


def _positions(folder: Path, trust_remote_code: bool) -> int | None:
    return positions_of(read_config(folder, trust_remote_code=trust_remote_code))

"""Perplexity protocols: which text, cut how. The id names everything that changes the number.

`wikitext2-raw/2048` is the published one: the raw test set joined by blank lines, tokenized once, cut into
non-overlapping windows of 2048, the rest dropped; the first token of a window predicts nothing. With
`windows`, that many windows evenly spaced over the text are taken, and the id says so.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError


@dataclass(frozen=True)
class Protocol:
    """A corpus cut into windows of `window_tokens`; `windows` of them evenly spaced, or all (None)."""

    corpus: str = "wikitext2-raw"
    window_tokens: int = 2048
    windows: int | None = None

    @property
    def id(self) -> str:
        chosen = "" if self.windows is None else f"[n={self.windows}]"
        return f"{self.corpus}/{self.window_tokens}{chosen}"


def token_windows(
    tokenizer: PreTrainedTokenizerBase, protocol: Protocol
) -> tuple[Int[Tensor, "windows tokens"], str]:
    """The windows as token ids, and where the text came from.

    Raises BitassayError where the text is shorter than what is asked for.
    """
    if protocol.window_tokens < 2:
        raise BitassayError(
            f"a window of {protocol.window_tokens} tokens predicts nothing", "--window 2 or more"
        )
    text = corpus(protocol.corpus)
    # The text is far longer than any model's context; it is cut right below, so the tokenizer need not warn.
    ids = tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]
    available = len(ids) // protocol.window_tokens
    wanted = available if protocol.windows is None else protocol.windows
    if not 1 <= wanted <= available:
        raise BitassayError(
            f"{text.source}: {len(ids)} tokens make {available} windows of {protocol.window_tokens}, "
            f"{wanted} were asked for",
            f"--windows 1 to {available}, or a shorter --window",
        )
    starts = torch.arange(wanted) * available // wanted
    return torch.stack(
        [ids[s * protocol.window_tokens :][: protocol.window_tokens] for s in starts]
    ), text.source

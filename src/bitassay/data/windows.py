"""Perplexity protocols: which text, cut how. The id names everything that changes the number.

`wikitext2-raw/2048` is the published protocol: the text is tokenized once and cut into non-overlapping
windows of 2048, the rest dropped; the first token of a window is not predicted. `corpora.py` says how each
text is joined. With `windows`, that many windows evenly spaced over the text are taken, and the id says so:
`ptb-new/512[n=16]`. A user's file has an id too: `notes.txt@1a2b3c4d5e6f7a8b/512`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitassay.data.corpora import Corpus, corpus, is_user_file, pinned
from bitassay.errors import BitassayError, suggestion
from bitassay.record.memory import release_freed_memory

PROTOCOLS = ("wikitext2-raw", "c4-new", "ptb-new", "c4-train-new")
TOKENIZING_BYTES = 140  # of a character while a text is tokenized, measured with three tokenizers
_ID = re.compile(r"(.+?)(?:/(\d{1,9}))?(?:\[n=(\d{1,9})\])?")


@dataclass(frozen=True)
class Protocol:
    """A corpus cut into windows of `window_tokens`; `windows` of them evenly spaced, or all (None)."""

    corpus: str = "wikitext2-raw"
    window_tokens: int = 2048
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.window_tokens < 2:
            raise BitassayError(
                f"a window of {self.window_tokens} tokens predicts nothing", "--window 2 or more"
            )
        if self.windows is not None and self.windows < 1:
            raise BitassayError(f"{self.windows} windows leave nothing to measure", "--windows 1 or more")

    @property
    def id(self) -> str:
        """Return the name of everything that changes the number."""
        chosen = "" if self.windows is None else f"[n={self.windows}]"
        return f"{self.corpus}/{self.window_tokens}{chosen}"

    @classmethod
    def parse(cls, text: str, *, window_tokens: int | None = None, windows: int | None = None) -> "Protocol":
        """Return the protocol of that name, file or id. The arguments say what the text leaves out, else it
        is 2048 tokens and all windows. Raises BitassayError for an unknown name, and where text and arguments
        disagree."""
        parts = _ID.fullmatch(text)
        if parts is None or not (parts[1] in PROTOCOLS or is_user_file(parts[1])):
            raise BitassayError(
                f"no protocol is called {text!r}; {suggestion(text, PROTOCOLS)}",
                "a name, an id such as ptb-new/512[n=16], or a file of your own: PATH.txt, PATH.jsonl",
            )
        settings = []
        for digits, value, option in (
            (parts[2], window_tokens, "--window"),
            (parts[3], windows, "--windows"),
        ):
            if digits is not None and value not in (None, int(digits)):
                raise BitassayError(f"{text!r} says {digits}, {option} says {value}", "leave one of them out")
            settings.append(value if digits is None else int(digits))
        length, count = settings
        return cls(pinned(parts[1]), 2048 if length is None else length, count)


NamedProtocol = Annotated[Protocol, BeforeValidator(Protocol.parse), PlainSerializer(lambda p: p.id)]
"""In files, a protocol is its id."""


class TooShortError(BitassayError):
    """A text has fewer windows than are wanted."""


def token_windows(
    tokenizer: PreTrainedTokenizerBase, protocol: Protocol
) -> tuple[Int[Tensor, "windows tokens"], str]:
    """Return the windows as token ids, and the text's source. Raises TooShortError for too few windows."""
    text = corpus(protocol.corpus)
    ids = _token_ids(tokenizer, len(tokenizer), text)
    available = len(ids) // protocol.window_tokens
    if text.max_windows is not None:
        available = min(available, text.max_windows)
    wanted = available if protocol.windows is None else protocol.windows
    if not 1 <= wanted <= available:
        fewer = {0: "", 1: "--windows 1, or "}.get(available, f"--windows 1 to {available}, or ")
        raise TooShortError(
            f"{text.source}: {len(ids)} tokens make {available} windows of {protocol.window_tokens}, "
            f"{wanted or 1} were asked for",
            f"{fewer}a shorter --window",
        )
    starts = torch.arange(wanted) * available // wanted
    return torch.stack(
        [ids[s * protocol.window_tokens :][: protocol.window_tokens] for s in starts]
    ), text.source


@lru_cache
def tokenizing_bytes(name: str) -> int:
    """Return the bytes that a corpus takes while it is tokenized. Raises BitassayError for one that is not
    here."""
    return TOKENIZING_BYTES * len(corpus(name).text)


@lru_cache(maxsize=4)
def _token_ids(tokenizer: PreTrainedTokenizerBase, _vocabulary: int, text: Corpus) -> Int[Tensor, " tokens"]:
    """The whole text, which takes seconds; kept, since a study calibrates dozens of models with it."""
    # The caller cuts it to the model's context, so the tokenizer need not warn of its length.
    ids = tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]
    release_freed_memory()  # a tokenizer takes a hundred times the text
    return ids

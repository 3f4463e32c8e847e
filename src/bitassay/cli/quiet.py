"""Keep what libraries print by themselves off stderr, which is for our progress and messages.

transformers, huggingface_hub, torch, compressed-tensors and lm-eval draw bars, log and warn, each in its own
way. Errors of theirs still come through, and `--debug` shows everything.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitassay.errors import BitassayWarning

# Read when the libraries are imported, in this process and in those that it starts.
VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COMPRESSED_TENSORS_LOG_DISABLED": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars, logs and warnings, but for our own warnings, which become one line each."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", BitassayWarning)
            warnings.showwarning = _show
            yield
    finally:
        logging.disable(before)


def _show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, BitassayWarning):  # a library may have changed the filters
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def without_bars() -> Iterator[None]:
    """Draw no bar of tqdm, also where a library asks for it against TQDM_DISABLE."""
    from tqdm import tqdm

    drawn: Callable[..., None] = tqdm.__init__

    def undrawn(self: Any, *arguments: Any, **options: Any) -> None:
        drawn(self, *arguments, **options | {"disable": True})

    tqdm.__init__ = undrawn  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = drawn  # type: ignore[method-assign]

"""How long work tells its caller that it moves.
The caller gives a function: the command line draws what it is told, a script may ignore it."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """A function that is told what is being done."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done; with `total`, that `done` of `total` steps are finished."""


def silent(what: str, done: int = 0, total: int = 0) -> None:
    """Ignore what is being done."""


def prefixed(name: str, progress: Progress) -> Progress:
    """Return a Progress that begins every line with `name`."""
    return lambda what, done=0, total=0: progress(f"{name}: {what}", done, total)

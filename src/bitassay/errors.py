"""Errors that a user can act on: what failed, the value seen, and one thing to try.

The command line prints them without a traceback and exits with `exit_status` (2 bad input, 3 something
missing in the environment). Everything else that is raised is a bug.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class BitassayError(ValueError):
    """Bad input or bad usage. `remedy` is one sentence or command that the reader can try."""

    exit_status = 2

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem}\n  try: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class MissingError(BitassayError):
    """Something that the environment should provide (a package, a network, disk space, a device) is not
    there."""

    exit_status = 3


class BitassayWarning(UserWarning):
    """Something that the user should know of and that changes no result. The command line prints it."""


def at_least(least: int, **values: int | None) -> None:
    """Raise BitassayError for the first of the options (named as in Python) that is below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise BitassayError(
                f"{option} is {value}; at least {least} is needed", f"{option} {least} or more"
            )


SHORT = 8  # a list of at most so many names is shown whole


def nearest(value: str, choices: Iterable[str], short: int = SHORT) -> str:
    """Return at most three choices close to `value`, quoted and joined for an error message. Where none is
    close: all of them if they are at most `short`, else the empty string."""
    names = sorted(choices)
    folded = {name.casefold(): name for name in names}
    close = [folded[name] for name in get_close_matches(value.casefold(), folded, n=3, cutoff=0.5)]
    return ", ".join(repr(name) for name in close or (names if len(names) <= short else ()))


def suggestion(value: str, choices: Iterable[str], short: int = SHORT) -> str:
    """Return the clause of an error message about a name that is none of `choices`: the nearest, or all."""
    names = list(choices)
    if shown := nearest(value, names, 0):
        return f"the nearest are {shown}"
    shown = nearest(value, names, short)
    return f"there are {shown}" if shown else f"none of the {len(names)} that there are is close"


def find(choices: Mapping[str, T], name: str, what: str, remedy: str = "") -> T:
    """Return the choice called `name`. Raises BitassayError that says `what` it is not and names the nearest
    ones."""
    if name not in choices:
        raise BitassayError(f"no {what} is called {name!r}; {suggestion(name, choices)}", remedy)
    return choices[name]

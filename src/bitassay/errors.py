"""Errors that a user can act on: what failed, the value seen, and one thing to try.

The command line prints them without a traceback and exits with `exit_status` (2 bad input, 3 something
missing in the environment). Everything else that is raised is a bug.
"""

from collections.abc import Iterable
from difflib import get_close_matches


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


def nearest(value: str, choices: Iterable[str]) -> str:
    """The choices closest to `value`, quoted and joined for an error message; all of them where none is
    close."""
    names = sorted(choices)
    close = get_close_matches(value, names, n=3, cutoff=0.5) or names
    return ", ".join(repr(name) for name in close)

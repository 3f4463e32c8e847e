"""What an attack is: a function that answers the requests of a `Setting`, and one registration.

A new attack is a function under `@attack(...)` in `hosts.py`, `steering.py` or `forgeries.py`, or an `Attack`
among the entry points `bitassay.attacks` of another package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.sampling import Sampler
from bitassay.verification.submissions import Submission
from bitassay.verification.trace import Trace


@dataclass(frozen=True)
class Setting:
    """The requests, `honest` traces that answer them (attacks forge from these), and the real model."""

    model: PreTrainedModel
    honest: Sequence[Trace]
    batch_size: int = 32

    @property
    def prompts(self) -> list[TokenIds]:
        """Return the prompts of the requests."""
        return [trace.header.prompt_ids for trace in self.honest]

    @property
    def sampler(self) -> Sampler:
        """Return the sampler that was asked for."""
        return self.honest[0].header.sampling.to_sampler()

    @property
    def max_new_tokens(self) -> int:
        """Return the length that was asked for."""
        return self.honest[0].header.sampling.max_new_tokens

    @property
    def nonces(self) -> list[str]:
        """Return the nonces of the requests."""
        return [trace.header.nonce for trace in self.honest]


@dataclass(frozen=True)
class Attack:
    """run: what a verifier is sent, one submission for each request of the setting. structural: exact checks
    must catch it, whatever the states. sampled: it needs requests that are sampled."""

    name: str
    about: str
    run: Callable[[Setting], Sequence[Submission]]
    structural: bool = False
    sampled: bool = False


LISTED: dict[str, Attack] = {}
Run = TypeVar("Run", bound=Callable[..., Sequence[Submission]])


def attack(name: str, about: str, *arguments: object, structural: bool = False, sampled: bool = False):
    """Return a decorator that lists a function as an attack; the function is called with the setting and
    `arguments`."""

    def register(function: Run) -> Run:
        def run(setting: Setting) -> Sequence[Submission]:
            return function(setting, *arguments)

        LISTED[name] = Attack(name, about, run, structural, sampled)
        return function

    return register

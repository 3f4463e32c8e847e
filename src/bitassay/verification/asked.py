"""What a verifier asked of a host, of which the host's files are to be the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitassay.data.corpora import prompts_from
from bitassay.engines.sampling import NonceSampler, Sampler
from bitassay.errors import BitassayError
from bitassay.verification.accounting import Answer
from bitassay.verification.receipts.challenge import Challenge
from bitassay.verification.structure import Request


@dataclass(frozen=True)
class SignedRequest:
    """The host's signed receipt, the key that the verifier knows as the host's, and either the verifier's own
    challenge or the host's small proof."""

    path: Path
    signer: bytes | None
    challenge: Challenge | None = None
    proof: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What was requested: each of `requests`, in their order, or the only one of every file. unanswered: how
    many more the host has not answered. by_nonce: whether a file is an answer to the request whose nonce it
    names, so that some may be missing; otherwise there is a file for each, in the same order."""

    requests: tuple[Request, ...] = (Request(),)
    unanswered: int = 0
    by_nonce: bool = False

    @classmethod
    def of(
        cls,
        count: int,
        prompt: str | None = None,
        prompts: Path | None = None,
        nonce: str | None = None,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        unanswered: int = 0,
        may_miss: bool = True,
    ) -> "Asked":
        """Return what was requested of `count` traces: the same of all, or by a file of prompts, whose
        numbers are appended to the nonce. may_miss: whether prompts without a trace are unanswered.

        Raises BitassayError where it cannot be said which file answers which prompt, or which seed follows
        from no nonce.
        """
        if nonce is None and isinstance(sampler, NonceSampler):
            raise BitassayError("--seed nonce needs the nonce that was requested", "--nonce WORD")
        texts = [prompt] if prompts is None else prompts_from(prompts)
        words = [nonce] * len(texts)
        if prompts is not None:
            may_miss = may_miss and nonce is not None
            if prompt is not None or (len(texts) != count and not may_miss):
                raise BitassayError(
                    f"--prompts names {len(texts)} prompts for {count} traces",
                    "one prompt a trace, or the --nonce that says which are missing; and no --prompt",
                )
            words = [None if nonce is None else f"{nonce}-{index}" for index in range(len(texts))]
        requests = tuple(
            Request(text, word, sampler and sampler.of_request(word or ""), max_new_tokens)
            for text, word in zip(texts, words, strict=True)
        )
        return cls(requests, unanswered, by_nonce=may_miss and prompts is not None)

    def request(self, index: int, nonce: str) -> Request:
        """Return what the file at `index`, which names this nonce, has to answer."""
        if self.by_nonce and nonce in self._numbers:
            return self.requests[self._numbers[nonce]]
        return self.requests[min(index, len(self.requests) - 1)]

    @cached_property
    def _numbers(self) -> dict[str | None, int]:
        return {request.nonce: number for number, request in enumerate(self.requests)}

    def missing(self, answers: Sequence[Answer | None]) -> list[Request]:
        """Return the requests of which no file came. A file that names none of them may be any, so that it
        is not missing as well."""
        if not self.by_nonce:
            return []
        named = [answer.header.nonce if answer else None for answer in answers]
        unclear = sum(nonce not in self._numbers for nonce in named)
        return [request for request in self.requests if request.nonce not in named][unclear:]

"""What engines share that read one text after the other, such as llama.cpp and vLLM: `OneByOneEngine`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Generation, Prefill, States, TokenIds, check_generation, check_ids
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.engines.scores import token_logprobs
from bitassay.engines.taps import check_layers
from bitassay.errors import BitassayError
from bitassay.models.positions import context_length

Until = Callable[[Sequence[int]], bool]  # whether an output, so far, is complete


def _never(_output: Sequence[int]) -> bool:
    return False


class OneByOneEngine(ABC):
    """An engine that continues and reads texts one by one. `model` has identity and tokenizer, and needs no
    weights. Replays of claimed states are refused."""

    title: str  # as messages call it

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def longest_text(self) -> int | None:
        """Return how many tokens the engine reads at most; None where there is no limit."""
        return context_length(self.model)

    @abstractmethod
    def continued(
        self,
        prompt: TokenIds,
        nonce: str,
        max_new_tokens: int,
        sampler: Sampler,
        layers: Sequence[int],
        until: Until,
    ) -> Generation:
        """Continue one prompt, whose tokens and layers are known to be right, until its end or `until`."""

    @abstractmethod
    def read(self, text: TokenIds, outputs: int, layers: Sequence[int]) -> Prefill:
        """Read one text: states after `layers` at all positions, and the logits of the last `outputs`."""

    def check(self, texts: Sequence[TokenIds], more: int, layers: Sequence[int]) -> None:
        """Raise BitassayError for texts that the engine cannot read and continue by `more` tokens, and for
        layers whose states it cannot show."""
        check_layers(self.model, layers)

    def encode(self, prompt: str | TokenIds) -> tuple[int, ...]:
        return encode_prompt(self.model, prompt)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        sampler: Sampler = GREEDY,
        nonces: Sequence[str] | None = None,
        layers: Sequence[int] = (),
        until: Until = _never,
    ) -> list[Generation]:
        """Continue each prompt, until it has ended or `until` says so of its output."""
        words = check_generation(self.model, prompts, nonces, max_new_tokens)
        self.check(prompts, max_new_tokens, layers)
        pairs = zip(prompts, words, strict=True)
        return [
            self.continued(prompt, word, max_new_tokens, sampler, layers, until) for prompt, word in pairs
        ]

    def prefill(
        self,
        prompts: Sequence[TokenIds],
        outputs: Sequence[TokenIds],
        *,
        layers: Sequence[int] = (),
        claimed: Sequence[States] | None = None,
    ) -> list[Prefill]:
        if claimed:
            raise BitassayError(
                f"{self.title} cannot go on from states that somebody claims", "transformers can"
            )
        texts = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
        check_ids(self.model, texts)
        self.check(texts, 1, layers)
        pairs = zip(texts, outputs, strict=True)
        return [self.read(text, len(output), layers) for text, output in pairs]

    def logprobs(self, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> list[Tensor]:
        # One at a time: all of the vocabulary takes memory.
        pairs = zip(prompts, outputs, strict=True)
        return [token_logprobs(self.prefill([p], [out])[0].logits, out) for p, out in pairs]

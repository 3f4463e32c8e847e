"""Generate one text a token at a time, for a server that sends each token when it is there.

Taps are on the model only while a step runs, so several streams of one model can take turns. Each computes
what it would compute alone: an answer does not depend on what else is being generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Generation, Steps, TokenIds, check_ids, end_tokens
from bitassay.engines.sampling import GREEDY, Draw, Sampler
from bitassay.engines.taps import joined_states, record_states
from bitassay.errors import BitassayError


@dataclass(frozen=True)
class Step:
    """One output token, the logits that it was chosen from, and whether it ends the text."""

    token: int
    logits: Float[Tensor, " vocabulary"]
    is_end: bool


class Stream:
    """Continue one prompt by a token for each `step`; what comes, and what is refused, as in `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: TokenIds,
        *,
        max_new_tokens: int,
        sampler: Sampler = GREEDY,
        nonce: str = "0",
        layers: Sequence[int] = (),
    ) -> None:
        if max_new_tokens < 1:
            raise BitassayError(f"max_new_tokens is {max_new_tokens}", "ask for at least 1")
        check_ids(model, [prompt], max_new_tokens - 1)
        self.model, self.sampler, self.nonce, self.layers = model, sampler, nonce, tuple(layers)
        self.max_new_tokens = max_new_tokens
        self.output_ids: list[int] = []
        self._steps, self._ends = Steps(model, [prompt]), end_tokens(model)
        self._recorded: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    @torch.no_grad()
    def step(self) -> Step:
        """Choose the next token and return it."""
        last = torch.tensor(self.output_ids[-1:], device=self.model.device) if self.output_ids else None
        with record_states(self.model, self.layers) as recorded:
            logits = self._steps.read(last)
        for layer, pieces in recorded.items():
            new = pieces[-1] if last is None else pieces[-1][:, -1:]  # not what was read before
            self._recorded[layer].append(new.cpu())
        token = int(self.sampler.choose(logits, [Draw(self.nonce, len(self.output_ids))])[0])
        self.output_ids.append(token)
        return Step(token, logits[0], token in self._ends)

    @property
    def generation(self) -> Generation:
        """Return the output so far, and the states at its positions."""
        states = {layer: rows[0] for layer, rows in joined_states(self._recorded).items()}
        return Generation(tuple(self.output_ids), states)

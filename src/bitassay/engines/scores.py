"""Log-probabilities of given tokens, from logits."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.engines.decode import TokenIds
from bitassay.models.precision import exact

ROWS = 64  # rows of the vocabulary's size in float64 that exist at a time


def token_logprobs(
    logits: Float[Tensor, "outputs vocabulary"], tokens: TokenIds
) -> Float[Tensor, " outputs"]:
    """Return the log-probability of each token, in nats and float64."""
    rows = zip(logits.split(ROWS), torch.tensor(tokens, device=logits.device).split(ROWS), strict=True)
    parts = list[Tensor]()
    for part, ids in rows:
        logprobs = exact(part).log_softmax(-1)
        parts.append(logprobs.gather(1, ids.to(logprobs.device)[:, None])[:, 0])
    return torch.cat(parts)

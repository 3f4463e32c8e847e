"""Scores of one window, token by token.
They are the loss, and the divergence of the next-token distribution from the base model's.

    nll_t = -log q(x_t | x_<t)
    KL_t  = sum_v p_v (log p_v - log q_v)        p: base model, q: candidate, in nats
    agree = argmax p = argmax q

Log-softmax is in fp32 whatever the model's dtype, and no more than a few rows of it exist at a time.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.engine import TRANSFORMERS, engine_name, engine_of

ROWS = 32  # rows of logits in work at a time


class TokenScores(NamedTuple):
    """One number for each predicted token of a window. Of the base model itself, kl is 0 and agree True."""

    nll: Float[Tensor, " predicted"]
    kl: Float[Tensor, " predicted"]
    agree: Bool[Tensor, " predicted"]


@torch.inference_mode()
def window_logits(
    model: PreTrainedModel, window: Int[Tensor, " tokens"]
) -> Float[Tensor, "predicted vocabulary"]:
    """Return the next-token logits at all positions but the last, which has no token to predict, in the
    dtype of whoever runs the model."""
    if engine_name(model) != TRANSFORMERS:
        ids = window.tolist()
        (read,) = engine_of(model).prefill([ids[:1]], [ids[1:]])
        return read.logits
    return model(window[None].to(model.device), use_cache=False).logits[0, :-1]


@torch.inference_mode()
def token_scores(
    logits: Float[Tensor, "predicted vocabulary"],
    targets: Int[Tensor, " predicted"],
    base_logits: Float[Tensor, "predicted vocabulary"] | None = None,
) -> TokenScores:
    """Score a candidate's logits against the base model's; without `base_logits`, the base's own."""
    nll, kl, agree = [], [], []
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        q = logits[rows].float()
        log_z = q.logsumexp(1)
        nll.append(log_z - q.gather(1, targets[rows, None].to(q.device))[:, 0])
        if base_logits is None:
            kl.append(torch.zeros_like(log_z))
            agree.append(torch.ones_like(log_z, dtype=torch.bool))
            continue
        p = base_logits[rows].float()
        log_p = p.log_softmax(1)
        # KL is never negative; fp32 cancellation leaves values below zero where the two agree.
        kl.append((log_p.exp() * (log_p - (q - log_z[:, None]))).sum(1).clamp(min=0))
        agree.append(p.argmax(1) == q.argmax(1))
    return TokenScores(torch.cat(nll).cpu(), torch.cat(kl).cpu(), torch.cat(agree).cpu())

"""Self-speculative decoding in a study: plane 1 drafts, all planes check, and the text is to be the one that
all planes write by themselves (`engines/speculative.py`).

In float32, where two tokens hardly ever tie within rounding. Seconds are of models that hold dense weights,
in which plane 1 is no cheaper to read than all planes: they show what the bookkeeping costs, beside whatever
else the machine does, and the bound what reading packed codes could gain.
"""

import time
from collections.abc import Callable
from typing import Any

from bitassay.data.windows import Protocol
from bitassay.engines.decode import generate
from bitassay.engines.load import load
from bitassay.engines.speculative import speculate
from bitassay.models.windows import model_windows
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.replication.on_demand import planes_on_demand
from bitassay.studies.variants import VariantPlan

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 32


def drafted(plan: VariantPlan, recipe: Recipe, length: int) -> dict[str, Any]:
    """Greedy texts with drafts of so many tokens and without any, one entry a text: whether they are
    identical, how many tokens were drafted and stood, checks, bytes of weights a token, seconds."""
    assert plan.protocol is not None
    base = load(
        plan.model,
        dtype="float32",
        device=plan.device,
        attention=plan.attention,
        trust_remote_code=plan.trust_remote_code,
    )
    model, reader = planes_on_demand(quantize_cached(base, recipe))
    prompts = model_windows(base, Protocol(plan.protocol.corpus, window_tokens=PROMPT_TOKENS, windows=TEXTS))[
        0
    ]
    work: dict[str, Callable[[list[int]], Any]] = {
        "plain": lambda prompt: generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0],
        "drafts": lambda prompt: speculate(
            model, reader, prompt, max_new_tokens=NEW_TOKENS, draft_tokens=length
        ),
    }
    for one in work.values():  # warm
        one(prompts[0].tolist())
    texts = []
    for place, prompt in enumerate(prompts.tolist()):
        made, seconds = dict[str, Any](), dict[str, float]()
        for name in sorted(work, reverse=bool(place % 2)):
            start = time.perf_counter()
            made[name] = work[name](prompt)
            seconds[name] = time.perf_counter() - start
        found, plain = made["drafts"], made["plain"].output_ids
        texts.append(
            {
                "identical": found.output_ids == plain,
                "tokens": len(plain),
                "drafted": found.drafted,
                "accepted": found.accepted,
                "checks": found.checks,
                "bytes_per_token": found.bytes_per_token,
                "plain_bytes_per_token": found.plain_bytes_per_token,
                "plain_seconds": seconds["plain"],
                "seconds": seconds["drafts"],
            }
        )
    return {"draft_tokens": length, "texts": texts}

"""Self-speculative decoding in a study: plane 1 drafts, all planes check.
The text is to be the one that all planes write by themselves (`engines/speculative.py`).

In float32, where two tokens hardly ever tie within rounding. Seconds are of models that hold dense weights,
in which plane 1 is no cheaper to read than all planes: they show what the bookkeeping costs, beside whatever
else the machine does, and the bound what reading packed codes could gain.
"""

import time
from dataclasses import asdict
from typing import Any

from bitassay.data.windows import Protocol
from bitassay.engines.decode import generate
from bitassay.engines.speculative import speculate
from bitassay.models.positions import model_windows
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.replication.any_precision import with_any_precision
from bitassay.studies.variants import VariantPlan

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 32


def check_speculation(plan: VariantPlan, recipe: Recipe, length: int) -> dict[str, Any]:
    """Return for each text whether greedy decoding with drafts of `length` tokens gives what it gives without
    them; how many tokens were drafted and accepted; checks, bytes of weights a token, seconds."""
    assert plan.protocol is not None
    base = plan.loaded(plan.model, dtype="float32", trust_remote_code=plan.trust_remote_code)
    model, reader = with_any_precision(quantize_cached(base, recipe))
    protocol = Protocol(plan.protocol.corpus, window_tokens=PROMPT_TOKENS, windows=TEXTS)
    prompts = model_windows(base, protocol)[0].tolist()

    def plain(prompt: list[int]) -> Any:
        return generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0]

    def speculative(prompt: list[int]) -> Any:
        return speculate(model, reader, prompt, max_new_tokens=NEW_TOKENS, draft_tokens=length)

    ways = (plain, speculative)
    for way in ways:  # warm
        way(prompts[0])
    texts = []
    for index, prompt in enumerate(prompts):
        outputs, seconds = {}, {}
        for way in ways[:: -1 if index % 2 else 1]:
            start = time.perf_counter()
            outputs[way] = way(prompt)
            seconds[way] = time.perf_counter() - start
        figures = asdict(outputs[speculative])
        output_ids, plain_ids = figures.pop("output_ids"), outputs[plain].output_ids
        texts.append(
            {
                "identical": output_ids == plain_ids,
                "tokens": len(plain_ids),
                **figures,
                "plain_seconds": seconds[plain],
                "seconds": seconds[speculative],
            }
        )
    return {"draft_tokens": length, "texts": texts}

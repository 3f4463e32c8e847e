"""Our perplexity pass beside the loop that everybody writes around transformers' own loss: the same number?
as fast?

Both run over the same windows in turn, order swapped each round; printed are the median time ratio (plain /
ours, above 1: ours is faster) and the relative difference of the perplexities. Run: python
benchmarks/perplexity.py [MODEL]
"""

import json
import statistics
import sys
import time

import torch

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluation.quality import score_windows
from bitassay.quantization.recipe.recipe import BASE
from bitassay.record.environment import environment

ROUNDS = 3
PROTOCOL = Protocol(window_tokens=1024, windows=2)


def plain(model, windows) -> float:
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss.double() for w in windows]
    return torch.stack(losses).mean().exp().item()


def ours(model, windows) -> float:
    scores = [found[BASE].nll.double().mean() for _, found in score_windows(model, {}, windows)]
    return torch.stack(scores).mean().exp().item()


def timed(function, *arguments) -> tuple[float, float]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


model = bitassay.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
windows, _ = token_windows(model.tokenizer, PROTOCOL)
plain(model, windows[:1]), ours(model, windows[:1])
ratios = []
for round_ in range(ROUNDS):
    order = (plain, ours) if round_ % 2 else (ours, plain)
    found = {function.__name__: timed(function, model, windows) for function in order}
    ratios.append(found["plain"][0] / found["ours"][0])
difference = abs(found["plain"][1] - found["ours"][1]) / found["plain"][1]
print(
    json.dumps(
        {
            "protocol": PROTOCOL.id,
            "perplexity": found["ours"][1],
            "relative_difference": difference,
            "plain_over_ours_median": statistics.median(ratios),
            "plain_over_ours": ratios,
            "seconds_ours": found["ours"][0],
            "environment": environment(),
        },
        indent=2,
    )
)

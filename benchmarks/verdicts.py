"""How often verdicts are right: honest traces, and traces of quantized models that claim to be the base
model.

A profile is fitted to honest bf16 runs at `ALPHA`; then every model proves the same PROMPTS other prompts, 32
tokens each, and the base model verifies them. Printed for each: the share of single traces that FAIL with its
95 % Clopper-Pearson interval. Run: python benchmarks/verdicts.py [MODEL]
"""

import json
import sys
import time

from scipy import stats

import bitassay
from bitassay.models.identity import identity
from bitassay.quantization.pipeline import quantize
from bitassay.record.environment import environment
from bitassay.studies.verdicts import chosen_prompts
from bitassay.verification.calibrate import calibrate
from bitassay.verification.prove import prove_many
from bitassay.verification.verify import verify_many

PROMPTS, CALIBRATION, NEW_TOKENS, ALPHA, BATCH = 40, 220, 24, 0.01, 32

base = bitassay.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="bfloat16")
prompts = chosen_prompts(base, PROMPTS + CALIBRATION, seed=1)
start = time.perf_counter()
profile = calibrate(
    base,
    base,
    prompts[PROMPTS:],
    max_new_tokens=NEW_TOKENS,
    alpha=ALPHA,
    batch_size=BATCH,
    guarantee="average",
)
seconds = {"calibrate": time.perf_counter() - start}
rows = []
for name in ("honest", "w4", "w2", "w8", "fp8", "w3"):
    start = time.perf_counter()
    prover = base if name == "honest" else quantize(base, name)
    traces = prove_many(
        prover, prompts[:PROMPTS], max_new_tokens=NEW_TOKENS, claim=identity(base), batch_size=BATCH
    )
    verdicts = verify_many(traces, base, profile=profile)
    judged = [verdict for verdict in verdicts if verdict.status != "INCONCLUSIVE"]
    failed = sum(verdict.status == "FAIL" for verdict in judged)
    interval = stats.binomtest(failed, len(judged)).proportion_ci(method="exact")
    distances = sorted(v.hidden_distance for v in judged)
    rows.append(
        {
            "prover": name,
            "traces": len(verdicts),
            "judged": len(judged),
            "failed": failed,
            "fail_rate": failed / len(judged),
            "fail_rate_ci": [interval.low, interval.high],
            "distance_smallest": distances[0],
            "distance_median": distances[len(distances) // 2],
            "distance_largest": distances[-1],
            "accept_rate_paper": sum(v.accept_rate("paper") for v in judged) / len(judged),
            "accept_rate_documents": sum(v.accept_rate("documents") for v in judged) / len(judged),
            "seconds": time.perf_counter() - start,
        }
    )
    print(rows[-1], file=sys.stderr)
held_out = profile.held_out.model_dump(mode="json")
print(
    json.dumps(
        {
            "alpha": ALPHA,
            "rows": rows,
            "held_out": held_out,
            "seconds": seconds,
            "environment": environment(),
        },
        indent=2,
    )
)

"""How small proofs tell honest hosts from quantized ones, on texts of `benchmarks/domains`.

    python benchmarks/proofs.py --model smollm2-135m --prompts 16 --out proofs.json

Honest hosts compute the model in bf16, with eager attention, in fp16, and one request at a time; the others
have INT8 weights, by row and in groups of 64, or an INT8 cache. One verifier in bf16 judges all. The
threshold is the 99th percentile of all honest runs together, by number of tokens; a run counts where it is
that long. A last part forges proofs for honest receipts, in each way of `FORGED_PROOFS`.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import bitassay
from bitassay.data.corpora import prompts_from
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers
from bitassay.quantization.inputs.kv_cache import KvCache, round_cache
from bitassay.verification.attacks.forgeries import FORGED_PROOFS, honest_receipt
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.detectors.small_proof import check_claimed
from bitassay.verification.observe import compare, observe
from bitassay.verification.prove import prove_many
from bitassay.verification.receipts.proof import SIZES
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace

DOMAINS = Path(__file__).parent / "domains"
HONEST, CHEAP = ("bf16", "eager", "fp16", "batch-1"), ("int8", "int8-g64", "kv8")
POSITIONS = (15, 63)  # those of 16 and 64 tokens
FORGED = 24
ALPHA = 0.01


def host(name: str, model: str) -> PreTrainedModel:
    """Return the model as a host runs it."""
    loaded = bitassay.load(model, dtype="bfloat16", attention="eager" if name == "eager" else "auto")
    if name == "fp16":
        return loaded.half()
    if name == "kv8":
        loaded = copy.deepcopy(loaded)
        round_cache(loaded, KvCache(format="int8", scale_dtype="float32"))
    if name.startswith("int8"):
        for layer in decoder_layers(loaded):
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = rounded(module.weight.data, 64 if name == "int8-g64" else None)
    return loaded


def rounded(weight: torch.Tensor, group: int | None) -> torch.Tensor:
    """Return a matrix in INT8, symmetric absmax by row or by `group` input columns."""
    grouped = weight.float().reshape(len(weight), -1, group or weight.shape[1])
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


def measured(traces: Sequence[Trace], verifier: PreTrainedModel) -> list[dict[str, tuple[float, ...]]]:
    """Return the series of both proofs, by run."""
    names = [f"proof-{size}" for size in SIZES]
    seen = observe(traces, verifier, [Request()] * len(traces), names)
    return [{name: run.series[name][0].values for name in names} for run in seen if run.series]


def statistics(runs: Sequence[dict[str, tuple[float, ...]]], name: str, n: int) -> np.ndarray:
    """Return the statistic after n positions of all runs that have so many."""
    statistic = DETECTORS[name].statistic
    return np.array([statistic(run[name][:n]) for run in runs if len(run[name]) >= n])


def forged(traces: Sequence[Trace], verifier: PreTrainedModel, name: str, size: int) -> list[float]:
    """Return the statistic of a forged proof for each trace."""
    found = []
    for trace in traces:
        receipt = honest_receipt(trace)
        proof = FORGED_PROOFS[name](trace, receipt, size)
        values = check_claimed(compare(trace, verifier), proof, receipt.commitment).values
        found.append(DETECTORS[f"proof-{size}"].statistic(values))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=16, help="of each domain")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    verifier = bitassay.load(options.model, dtype="bfloat16")
    prompts = [
        text for path in sorted(DOMAINS.glob("*.jsonl.gz")) for text in prompts_from(path)[: options.prompts]
    ]
    runs: dict[str, list[dict[str, tuple[float, ...]]]] = {}
    honest: list[Trace] = []
    for name in (*HONEST, *CHEAP):
        traces = prove_many(
            host(name, options.model),
            prompts,
            max_new_tokens=max(POSITIONS) + 1,
            claim=identity(verifier),
            nonces=[f"{name}-{index}" for index in range(len(prompts))],
            batch_size=1 if name == "batch-1" else 16,
        )
        runs[name] = measured(traces, verifier)
        honest = (
            honest or [trace for trace in traces if trace.n_tokens > 16][:: max(1, len(traces) // FORGED)]
        )
        print(f"{name}: {len(runs[name])} runs", flush=True)
    rows = []
    for size in SIZES:
        proof = f"proof-{size}"
        for n in POSITIONS:
            values = {name: statistics(runs[name], proof, n) for name in runs}
            pooled = np.sort(np.concatenate([values[name] for name in HONEST]))
            threshold = pooled[min(math.ceil((len(pooled) + 1) * (1 - ALPHA)), len(pooled)) - 1]
            for name, found in values.items():
                rows.append(
                    {"proof": proof, "tokens": n + 1, "host": name, "runs": len(found)}
                    | {"mean": found.mean(), "sd": found.std(), "refused": float((found > threshold).mean())}
                    | {"above_every_honest_run": float((found > pooled[-1]).mean())}
                )
                print(
                    {
                        key: round(value, 3) if isinstance(value, float) else value
                        for key, value in rows[-1].items()
                    }
                )
        for name in FORGED_PROOFS:
            print(proof, "forged", name, f"least {min(forged(honest, verifier, name, size)):.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

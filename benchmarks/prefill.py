"""A prefill pass against the matrix throughput of the machine at the same dtype, and where the rest goes.

In each round the peak of a matrix product (bf16; int8 where a recipe rounds inputs too) is measured, then one
prefill of the same prompt by every model, in turns; the share is the peak's time for the pass's FLOP over the
time that it took. Then one pass is profiled: seconds of torch's own operations, by what they are for.

Run: python benchmarks/prefill.py [--model smollm2-135m] [--tokens 512] [--rounds 5] [--format json]
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

import bitassay
from bitassay.bench.roofline import matrix_peak, product_dtype
from bitassay.bench.timing import INTERVAL, ratio_of, spread, time_once, turns
from bitassay.bench.workload import ModelTimer, Workload
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.environment import environment

W8A8 = {"name": "w8a8", "weights": {"format": "int8", "granularity": "channel"}, "activations": {}}
# The first pattern that an operation's name holds says what it is for.
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "bmm"),
    "products": ("mm", "linear", "mkldnn"),
    "copies": ("copy_", "to_copy", "cat", "clone", "contiguous", "index"),
    "norms and activations": ("mul", "add", "silu", "pow", "mean", "rsqrt", "neg", "sub", "gelu"),
    "rounding": ("round", "clamp", "amax", "amin", "abs", "div", "bitwise", "shift", "maximum"),
}


def kind_of(operation: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), "other")


def where_it_goes(runner: ModelTimer, cell: Workload) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Shares of the time inside torch's operations, by kind, and the ten largest operations."""
    activities = [ProfilerActivity.CPU]
    if runner.model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        time_once(runner.model, runner.prompts(cell), 0)
    device = runner.model.device.type == "cuda"
    own = {
        event.key: event.self_device_time_total if device else event.self_cpu_time_total
        for event in found.key_averages()
    }
    total, kinds = sum(own.values()), defaultdict(float)
    for name, seconds in own.items():
        kinds[kind_of(name)] += seconds / total
    largest = sorted(((name, seconds / total) for name, seconds in own.items()), key=lambda pair: -pair[1])
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1])), largest[:10]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--format", default="table", choices=["table", "json"])
    asked = parser.parse_args()

    base = bitassay.load(asked.model, dtype="bfloat16", device=asked.device)
    recipes = {"int8": "w8", "int4": "w4", "int8 both sides": Recipe.model_validate(W8A8)}
    runners = {"bf16": ModelTimer(base)}
    runners |= {name: ModelTimer(bitassay.quantize(base, one, packed=True)) for name, one in recipes.items()}
    dtypes = {name: product_dtype(runner.model) for name, runner in runners.items()}
    cell = Workload("batch", asked.batch, asked.tokens, 1)

    times: dict[str, list[float]] = {name: [] for name in runners}
    shares: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(asked.rounds):
        peaks = {dtype: matrix_peak(dtype, base.device) for dtype in set(dtypes.values())}
        for name in turns(list(runners), round_):
            found = runners[name].measure(cell)
            if "skipped" in found:
                sys.exit(f"{name}: {found['skipped']}")
            times[name].append(found["first_token_s"])
            peak = peaks[dtypes[name]]
            assert peak is not None
            shares[name].append(found["costs"]["prefill"]["flop"] / peak / found["first_token_s"])
        print(f"round {round_ + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, runner in runners.items():
        ratio = ratio_of(times["bf16"], times[name])
        kinds, largest = where_it_goes(runner, cell)
        rows.append(
            {
                "model": name,
                "products_in": dtypes[name],
                "over_bf16": ratio.value,
                "over_bf16_ci": ratio.interval,
                "share_of_peak": statistics.median(shares[name]),
                "spread": spread(times[name]),
                "kinds": kinds,
                "operations": largest,
            }
        )
    if asked.format == "json":
        print(json.dumps({"rows": rows, "interval": INTERVAL, "environment": environment()}))
        return
    print("| model | products in | over bf16 [95 %] | share of the peak | where the time goes |")
    print("|---|---|---:|---:|---|")
    for row in rows:
        pair = row["over_bf16_ci"]
        ends = f" [{pair[0]:.2f}, {pair[1]:.2f}]" if pair else ""
        goes = ", ".join(f"{kind} {share:.0%}" for kind, share in row["kinds"].items() if share >= 0.01)
        print(
            f"| {row['model']} | {row['products_in']} | {row['over_bf16']:.2f}{ends} | "
            f"{row['share_of_peak']:.0%} | {goes} |"
        )


if __name__ == "__main__":
    main()

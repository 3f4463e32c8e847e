"""The prefill of packed linears beside bf16's: one product of some rows with a matrix in codes, over the same
with a matrix in bf16, and how long the codes take to become weights.

Timed is the CPU time of this process, which other processes on the machine change less than the clock's; the
two take turns, and medians count. A figure above 2 is slower than half of bf16's speed.

Run: OMP_NUM_THREADS=1 python benchmarks/packed_prefill.py [--rounds 9] [--format json]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.record.environment import environment

SHAPES = ((1536, 576), (2048, 2048))  # SmolLM2-135M's up projection; a square one
ROWS = (33, 64, 128, 256, 257, 512)
SCHEMES = {
    "int2": {"format": "int2", "granularity": "g64", "symmetric": False},
    "int3": {"format": "int3", "granularity": "g64", "symmetric": False},
    "int4": {"format": "int4", "granularity": "g64", "symmetric": False},
    "ternary": {"format": "ternary", "granularity": "g128"},
    "binary": {"format": "binary", "granularity": "g128"},
    "int8": {"format": "int8", "granularity": "channel"},
    "fp8": {"format": "fp8_e4m3", "granularity": "channel"},
}


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each; a first round is not timed."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            seconds = cpu_seconds(work)
            if round_:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--format", default="table", choices=["table", "json"])
    asked = parser.parse_args()
    table = []
    for out, columns in SHAPES:
        weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
        dense = weight.bfloat16()
        for name, fields in SCHEMES.items():
            quantized = quantize_tensor(weight, WeightScheme.model_validate(fields), name)
            packed = QuantizedLinear(quantized, None, torch.bfloat16)
            row: dict[str, object] = {"shape": f"{out}x{columns}", "format": name}
            for rows in ROWS:
                x = torch.randn(rows, columns).bfloat16()
                works = {"bf16": partial(nn.functional.linear, x, dense), "packed": partial(packed, x)}
                times = in_turns(works, asked.rounds)
                row[f"{rows} rows"] = times["packed"] / times["bf16"]
            row["dequantize ms"] = 1000 * in_turns({"one": quantized.dequantize}, asked.rounds)["one"]
            table.append(row)
    if asked.format == "json":
        print(json.dumps({"rows": table, "environment": environment()}))
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for row in table:
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

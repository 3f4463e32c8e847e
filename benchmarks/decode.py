"""Decoding with our packed models beside plain transformers in bf16 and beside torchao, in turns.

For batch 1 and 8: the ratio to plain bf16 of seconds a step (above 1: faster), with the interval over rounds,
and the share reached of what the machine's bandwidth, measured in the same rounds, allows for the bytes of
weights and cache that each model has. torchao is optional: INT8 weight-only, and INT4 in groups of 64 where
it runs on this device; what it cannot do is named. It may be installed beside the environment:

    pip install --no-deps --target DIR torchao==0.18.0
    PYTHONPATH=DIR python benchmarks/decode.py [--model smollm2-135m] [--rounds 7] [--format json]
"""

import argparse
import copy
import json
import statistics
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

import bitassay
from bitassay.bench.roofline import Cost, machine_limits
from bitassay.bench.timing import INTERVAL, ratio_of, spread, turns
from bitassay.bench.workload import ModelTimer, Workload
from bitassay.models.walk import walk
from bitassay.record.environment import environment

OURS = {"int8": "w8", "int4": "w4"}
BASE = "transformers bf16"
GROUP = 64


@dataclass
class Peers:
    """Models by name, the bits of a weight in their linears, and why the others are not there."""

    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def int8_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4_config():
    """On a CPU torchao 0.18 keeps it among its prototypes."""
    if torch.cuda.is_available():
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def torchao_models(base: PreTrainedModel) -> Peers:
    found = Peers()
    if find_spec("torchao") is None:
        found.missing["torchao"] = "not installed"
        return found
    from torchao.quantization import quantize_

    shapes = [linear.weight.shape for linear in walk(base).linears.values()]
    a_row = 16 * sum(out for out, _ in shapes) / sum(out * columns for out, columns in shapes)
    kinds = {
        "torchao int8": (int8_config, 8 + a_row),
        "torchao int4": (int4_config, 4 + 2 * 16 / GROUP),
    }
    for name, (config, bits) in kinds.items():
        model = copy.deepcopy(base)
        try:
            quantize_(model.get_decoder().layers, config())
            with torch.inference_mode():
                model(torch.tensor([[1, 2, 3]], device=model.device))
        except Exception as error:  # whatever a peer trips over is its result here
            found.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            continue
        found.models[name], found.bits[name] = model, bits
    return found


class TorchaoRunner(ModelTimer):
    """Its bytes are counted from bits a weight: what a torchao tensor holds is its own business."""

    def __init__(self, model: PreTrainedModel, base: ModelTimer, bits: float):
        super().__init__(model)
        self.bits, self.matrices = bits, base.matrices

    def measure(self, cell: Workload) -> dict:
        found = super().measure(cell)
        if "costs" in found:
            of = self.matrices
            smaller = of.body_weights * (16 - self.bits) / 8
            for cost in found["costs"].values():
                cost["bytes"] -= smaller
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--format", default="table", choices=["table", "json"])
    asked = parser.parse_args()

    base = bitassay.load(asked.model, dtype="bfloat16")
    runners = {BASE: ModelTimer(base)}
    for name, recipe in OURS.items():
        runners[f"bitassay {name}"] = ModelTimer(bitassay.quantize(base, recipe, packed=True))
    peers = torchao_models(base)
    for name, model in peers.models.items():
        runners[name] = TorchaoRunner(model, runners[BASE], peers.bits[name])

    rows, limits = [], []
    for batch in asked.batches:
        cell = Workload("batch", batch, asked.prompt_tokens, asked.new_tokens)
        times: dict[str, list[float]] = {name: [] for name in runners}
        shares: dict[str, list[float]] = {name: [] for name in runners}
        for round_ in range(asked.rounds):
            limits.append(machine_limits(base.device))
            for name in turns(list(runners), round_):
                found = runners[name].measure(cell)
                if "skipped" in found:
                    sys.exit(f"{name}, batch {batch}: {found['skipped']}")
                seconds = found["decode_s"] / cell.new_tokens
                cost = Cost(**found["costs"]["decode"])
                times[name].append(seconds)
                shares[name].append(
                    cost.bound_s(limits[-1]["bandwidth"], limits[-1]["peaks"]["bfloat16"]) / seconds
                )
            print(f"batch {batch}: round {round_ + 1} of {asked.rounds}", file=sys.stderr, flush=True)
        for name in runners:
            ratio = ratio_of(times[BASE], times[name])
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "over_bf16": ratio.value,
                    "over_bf16_ci": ratio.interval,
                    "share_of_bound": statistics.median(shares[name]),
                    "spread": spread(times[name]),
                }
            )
    if asked.format == "json":
        about = {"interval": INTERVAL, "missing": peers.missing, "limits": limits}
        print(json.dumps({"rows": rows, **about, "environment": environment()}))
        return
    print("| model | batch | over bf16 [95 %] | share of bound | spread |\n|---|---:|---:|---:|---:|")
    for row in rows:
        pair = row["over_bf16_ci"]
        ends = f" [{pair[0]:.2f}, {pair[1]:.2f}]" if pair else ""
        print(
            f"| {row['model']} | {row['batch']} | {row['over_bf16']:.2f}{ends} | "
            f"{row['share_of_bound']:.0%} | {row['spread']:.0%} |"
        )
    for name, why in peers.missing.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()

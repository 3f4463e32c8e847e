"""What a number format costs: the share of a linear's output energy that is lost, beside the bits it takes.

For every linear of a few layers of a model, and its inputs over C4 (`8 x 512` tokens), the mean of

    E || (W' - W) x ||^2 / E || W x ||^2

once with W rounded to nearest on grids weighed by the inputs, once by GPTQ on such grids. It compares
formats, not models: perplexity is `benchmarks/quality.py`'s.

Run: python benchmarks/formats.py [--model smollm2-135m] [--formats int2 ...] [--format table|json]
"""

import argparse
import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import bitassay
from bitassay.models.walk import walk
from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.gptq import gptq, gptq_binary
from bitassay.quantization.solvers.layerwise import hessian_of
from bitassay.record.environment import environment

LAYERS = (0, 15)
FREE = {"symmetric": False, "zero_point": "free"}
PLANES = {"format": "binary", "symmetric": False, "column_scales": True}
SCHEMES: dict[str, dict] = {
    "int4 g64": {"format": "int4", "granularity": "g64", "scale": "mse"},
    "int4 g64, offset 0.5": {"format": "int4", "granularity": "g64", "scale": "mse", "offset": 0.5},
    "int4 g64, asymmetric": {"format": "int4", "granularity": "g64", "scale": "mse", "symmetric": False},
    "int4 adaptive64, asymmetric": {
        "format": "int4", "granularity": "adaptive64", "scale": "mse", "symmetric": False,
    },
    "int4 g128, free zero points": {"format": "int4", "granularity": "g128", "scale": "mse"} | FREE,
    "int2 g64": {"format": "int2", "granularity": "g64"},
    "int2 g64, restricted": {"format": "int2", "granularity": "g64", "restricted": True},
    "int2 g64, offset 0.5": {"format": "int2", "granularity": "g64", "offset": 0.5},
    "int2 g64, asymmetric": {"format": "int2", "granularity": "g64", "symmetric": False},
    "int2 g64, searched zero points": {
        "format": "int2", "granularity": "g64", "symmetric": False, "zero_point": "searched",
    },
    "int2 g64, middle zero points": {
        "format": "int2", "granularity": "g64", "symmetric": False, "zero_point": "middle",
    },
    "int2 g128, free zero points": {"format": "int2", "granularity": "g128"} | FREE,
    "int2 g64, free zero points": {"format": "int2", "granularity": "g64"} | FREE,
    "ternary g64": {"format": "ternary", "granularity": "g64"},
    "binary g64": {"format": "binary", "granularity": "g64"},
    "binary g64, mean": {"format": "binary", "granularity": "g64", "symmetric": False},
    "binary rows, mean, column scales": PLANES,
    "the same, second plane for 10 %": PLANES | {"residual": 0.1},
    "the same, second plane for 45 %": PLANES | {"residual": 0.45},
    "the same, second plane for all": PLANES | {"residual": 1.0},
}  # fmt: skip


def matrices(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix and the sum of `x x^T` over its inputs."""
    model = bitassay.load(name, dtype=torch.float32)
    linears = {
        name: linear
        for name, linear in walk(model).linears.items()
        if any(f"layers.{layer}." in name for layer in LAYERS)
    }
    hessians: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _, args: hessians.__setitem__(name, hessian_of(args[0]))

    handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    with torch.inference_mode():
        model.get_decoder()(calibration_tokens(model, Calibration(samples=8)))
    for handle in handles:
        handle.remove()
    for name, linear in linears.items():
        yield linear.weight.detach(), hessians[name]


def lost(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor) -> float:
    error, w = (tensor.dequantize() - weight).double(), weight.double()
    return (((error @ hessian) * error).sum() / ((w @ hessian) * w).sum()).item()


def by_gptq(weight: Tensor, hessian: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    if scheme.has_planes:
        return gptq_binary(weight, hessian, scheme, Gptq())[0]
    scheme = adapted(weight, scheme, hessian.diagonal().float())
    return gptq(weight, hessian, [scheme], Gptq()).tensor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--formats", nargs="+", choices=sorted({s["format"] for s in SCHEMES.values()}))
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    known = [(weight, hessian.double()) for weight, hessian in matrices(options.model)]
    weights = sum(weight.numel() for weight, _ in known)
    rows = []
    for name, fields in SCHEMES.items():
        scheme = WeightScheme.model_validate(fields)
        if options.formats and scheme.format not in options.formats:
            continue
        nearest = [quantize_tensor(w, scheme, importance=h.diagonal().float()) for w, h in known]
        solved_ = [by_gptq(w, h, scheme) for w, h in known]
        rows.append({
            "scheme": name,
            "bits_per_weight": sum(tensor.stored_bits for tensor in nearest) / weights,
            "lost_nearest": sum(lost(*m, t) for m, t in zip(known, nearest, strict=True)) / len(known),
            "lost_gptq": sum(lost(*m, t) for m, t in zip(known, solved_, strict=True)) / len(known),
        })  # fmt: skip
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    if options.format == "json":
        print(json.dumps({"environment": environment(), "model": options.model, "rows": rows}))
        return
    print("| scheme | bits | nearest | GPTQ |\n|---|---:|---:|---:|")
    for row in rows:
        bits, nearest, solved_ = row["bits_per_weight"], row["lost_nearest"], row["lost_gptq"]
        print(f"| {row['scheme']} | {bits:.2f} | {nearest:.4f} | {solved_:.4f} |")


if __name__ == "__main__":
    main()

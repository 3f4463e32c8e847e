"""What it costs to round the linears' inputs and the KV cache, way by way: KL to the model in fp32.

    quantized    every linear of the decoder's layers: int8 weights, a scale for each row; beside that one way
                 of rounding inputs, or one of rounding keys and values
    calibration  SAMPLES windows of 512 tokens of C4, for the ways that need a range
    evaluation   WINDOWS windows of 512 tokens of WikiText-2's raw test set

Run: python benchmarks/inputs.py [--model smollm2-135m] [--windows 8] [--samples 8] [--format table|json]
"""

import argparse
import json
import sys
from typing import Any

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluation.quality import score_windows, summarise
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.record.environment import environment

WEIGHTS = {"format": "int8", "granularity": "channel"}
WAYS: dict[str, dict[str, Any]] = {
    "int8, a scale for each token": {"activations": {"format": "int8"}},
    "the same with a zero point": {"activations": {"format": "int8", "symmetric": False}},
    **{
        f"int8, one scale: {scale}": {"activations": {"format": "int8", "scale": scale}}
        for scale in ("absmax", "percentile", "moving_average", "kl", "learned")
    },
    "int16, a scale for each token": {"activations": {"format": "int16"}},
    "fp8_e4m3 weights and inputs, a scale for each token": {"activations": {"format": "fp8_e4m3"}},
    "KV cache int8, a scale for each head and token": {"kv_cache": {"format": "int8"}},
    "KV cache int4, the same": {"kv_cache": {"format": "int4"}},
    "KV cache int4, groups of 32, zero points": {
        "kv_cache": {"format": "int4", "granularity": "g32", "symmetric": False}
    },
    "KV cache fp8_e4m3, a scale for each head and token": {"kv_cache": {"format": "fp8_e4m3"}},
}


def recipes(samples: int) -> dict[str, Recipe]:
    text = {"samples": samples, "tokens": 512}
    made = {"int8 weights alone": Recipe(name="w8", weights=WEIGHTS)}
    for way, parts in WAYS.items():
        static = parts.get("activations", {}).get("scale") is not None
        fp8 = parts.get("activations", {}).get("format") == "fp8_e4m3"
        weights = {"format": "fp8_e4m3", "granularity": "channel"} if fp8 else WEIGHTS
        made[way] = Recipe(
            name=f"way-{len(made)}", weights=weights, **parts, **({"calibration": text} if static else {})
        )
    return made


def measure(given: argparse.Namespace) -> dict[str, Any]:
    base = bitassay.load(given.model)
    models = {}
    for way, recipe in recipes(given.samples).items():
        print(way, file=sys.stderr, flush=True)
        models[way] = bitassay.quantize(base, recipe)
    windows, _ = token_windows(base.tokenizer, Protocol(window_tokens=512, windows=given.windows))
    found = [scores for _, scores in score_windows(base, models, windows)]
    rows = []
    for way in models:
        quality = summarise([scores[way] for scores in found], [scores[BASE] for scores in found])
        rows.append({"way": way, "ppl": quality.ppl, "kl_mean": quality.kl_mean, "kl_ci": quality.kl_ci})
    return {"model": given.model, "rows": rows, "environment": environment()}


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--windows", type=int, default=8)
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--format", choices=("table", "json"), default="table")
    chosen = options.parse_args()
    result = measure(chosen)
    if chosen.format == "json":
        print(json.dumps(result, indent=2))
    else:
        for row in result["rows"]:
            low, high = row["kl_ci"]
            print(f"{row['way']:52} KL {row['kl_mean']:.4g} [{low:.4g}, {high:.4g}]")

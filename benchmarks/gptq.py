"""How long GPTQ takes beside a package's: the same model, tokens, bits and group, in turn, several times.

    theirs    GPTQModel's `quantize` call alone, without loading, packing or saving, of the model in fp32 and
              of the model in bf16
    ours      the whole `bitassay quantize` command: loading, GPTQ, and writing a checkpoint

All are measured and scored as in `quality.py`, each round in a folder of its own below OUT, so that the same
command goes on where it stopped. Ratios are of medians. Run: OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE
python benchmarks/gptq.py [--model smollm2-135m] [--rounds 2] [--bits 4] [--group 128] [--out runs/gptq]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from quality import Bench, pairs

from bitassay.quantization.recipe.recipe import find_recipe
from bitassay.record.environment import environment

DTYPES = ("float32", "bfloat16")  # of the model that GPTQModel loads
SHOWN = (
    "tool",
    "version",
    "bits_per_weight",
    "ppl",
    "kl_mean",
    "kl_ci",
    "seconds",
    "cpu_seconds",
    "peak_bytes",
)


def recipe_file(folder: Path, bits: int, group: int) -> str:
    """Plain GPTQ in integers with a zero point; text runs through the layers in bf16, as GPTQModel's models
    may."""
    weights = {"format": f"int{bits}", "granularity": f"g{group}", "symmetric": False, "scale": "mse"}
    path = folder / f"gptq-w{bits}-g{group}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    calibration = {"precision": "bfloat16"}
    recipe = {"name": path.stem, "weights": weights, "calibration": calibration, "gptq": {}}
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], unit: str) -> float | None:
    """Of medians; a row that was interrupted has no times, and None is what is left without any."""
    times = [[row[unit] for row in rows if row[unit] is not None] for rows in (ours, theirs)]
    return statistics.median(times[0]) / statistics.median(times[1]) if all(times) else None


def measure(given: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_file(given.out, given.bits, given.group)
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], **{dtype: [] for dtype in DTYPES}}
    for index in range(given.rounds):
        bench = Bench(given.model, given.out / f"round-{index}", 0)
        for dtype in DTYPES:
            rows[dtype].append(bench.peer("gptqmodel", given.bits, given.group, dtype))
        rows["ours"].append(bench.recipe(find_recipe(recipe), recipe))
    return {
        "rows": [
            {"who": who, **{key: row[key] for key in SHOWN}}
            for who, measured in rows.items()
            for row in measured
        ],
        "ours_over_theirs": {
            dtype: {unit: ratio(rows["ours"], rows[dtype], unit) for unit in ("seconds", "cpu_seconds")}
            for dtype in DTYPES
        },
        "pairs": {dtype: pairs([rows["ours"][0], rows[dtype][0]])[0] for dtype in DTYPES},
        "environment": environment(),
    }


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    options.add_argument("--group", type=int, default=128)
    options.add_argument("--out", type=Path, default=Path("runs/gptq"))
    print(json.dumps(measure(options.parse_args()), indent=2))

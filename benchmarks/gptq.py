"""How long GPTQ takes beside a package's: the same model, tokens, bits and group, in turn, several times.

    theirs    GPTQModel's `quantize` call alone, without loading, packing or saving
    ours      the whole `bitassay quantize` command: loading, GPTQ, and writing a checkpoint

Both are measured and scored as in `quality.py`, each round in a folder of its own below OUT, so that the same
command goes on where it stopped. The ratio is of medians. Run: OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE
python benchmarks/gptq.py [--model smollm2-135m] [--rounds 2] [--bits 4] [--group 128] [--out runs/gptq]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from quality import Bench, pairs

from bitassay.bench.environment import environment
from bitassay.quantize.recipe import find_recipe

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


def ratio(rows: list[dict[str, Any]], unit: str) -> float | None:
    """Of medians; a row of ours that was interrupted has no times, and None is what is left without any."""
    ours, theirs = (
        [row[unit] for row in rows if row["tool"].startswith(tool) and row[unit] is not None]
        for tool in ("bitassay", "gptqmodel")
    )
    return statistics.median(ours) / statistics.median(theirs) if ours and theirs else None


def measure(given: argparse.Namespace) -> dict[str, Any]:
    recipe, rows = recipe_file(given.out, given.bits, given.group), []
    for index in range(given.rounds):
        bench = Bench(given.model, given.out / f"round-{index}", 0)
        rows += [bench.peer("gptqmodel", given.bits, given.group), bench.recipe(find_recipe(recipe), recipe)]
    return {
        "rows": [{key: row[key] for key in SHOWN} for row in rows],
        **{f"{unit}_ours_over_theirs": ratio(rows, unit) for unit in ("seconds", "cpu_seconds")},
        "pairs": pairs(rows[:2]),
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

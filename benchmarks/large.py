"""Peak memory of work on models larger than memory, beside what was told beforehand.

    python benchmarks/large.py write FOLDER [--shape llama-2-7b] [--layers N]
    python benchmarks/large.py measure FOLDER [--samples 128] [--only w4 gptq-4bit eval]

`write` makes a checkpoint of random weights in bf16 in the shape of a published model, a layer at a time,
with stories260k's tokenizer; llama-2-7b takes 13.5 GB of disk. `measure` runs one command after the other
under `/usr/bin/time -v` and prints the peak, the plan's figure and the seconds of each; it may take no more
private memory (RLIMIT_DATA) than the plan's figure and 15 %. Peaks do not depend on how many layers there
are, which `write --layers 1` and `--layers 3` show.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from bitassay.data.windows import Protocol
from bitassay.evaluation.memory import memory_of
from bitassay.models.empty import empty_model, without_weights
from bitassay.models.source import resolve
from bitassay.quantization.export.plan import OPENED
from bitassay.quantization.recipe.recipe import find_recipe

MORE = 1.15  # times what was told beforehand is what a command may take
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
    },
    "wide": {
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "num_attention_heads": 20,
        "vocab_size": 512,
    },
    "llama-32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}


def write(folder: Path, shape: str, layers: int | None, seed: int = 0) -> None:
    """Write a checkpoint of random weights, each decoder layer into a file of its own."""
    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(
        "llama", **{"num_attention_heads": 32, "max_position_embeddings": 4096, **fields}
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("stories260k").folder).save_pretrained(folder)
    model, generator = empty_model(config, torch.bfloat16), torch.Generator().manual_seed(seed)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, value in model.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        parts.setdefault("rest" if layer is None else f"{int(layer[1]):03}", {})[name] = value.shape
    index = {}
    for part, shapes in parts.items():
        tensors = {}
        for name, size in shapes.items():
            if len(size) == 1:
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            else:
                drawn = torch.empty(size, dtype=torch.bfloat16).normal_(
                    0, size[1] ** -0.5, generator=generator
                )
                tensors[name] = drawn
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def peak(command: list[str], limit_gb: float | None = None) -> tuple[float, float, str, str]:
    """Run a command; return its peak memory in GB, seconds, what it printed, and what it noted. limit_gb: it
    may have no more private memory than that."""
    bounds = [] if limit_gb is None else ["prlimit", f"--data={int(limit_gb * 1e9)}"]
    with tempfile.NamedTemporaryFile("r") as log:
        done = subprocess.run(
            ["/usr/bin/time", "-v", "-o", log.name, *bounds, sys.executable, "-m", "bitassay.cli", *command],
            capture_output=True,
            text=True,
        )
        said = log.read()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    kilobytes = int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", said)[1])
    clock = re.search(r"Elapsed .*: ([\d:.]+)", said)[1].split(":")
    seconds = sum(60**n * float(part) for n, part in enumerate(reversed(clock)))
    return kilobytes * 1024 / 1e9, seconds, done.stdout, done.stderr


GPTQ = """name: gptq-4bit
weights: {format: int4, granularity: g64, symmetric: false}
calibration: {samples: 128, tokens: 512}
gptq: {}
"""


def measure(folder: Path, samples: int, only: list[str]) -> None:
    """Print the peak of each command beside what is told beforehand."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        recipe = Path(scratch) / "gptq-4bit.yaml"
        recipe.write_text(GPTQ.replace("128", str(samples)))
        print(f"{'command':44} {'peak GB':>8} {'plan GB':>8} {'seconds':>8}", flush=True)
        for name, budget in (("w4", "3GB"), (str(recipe), "6GB")):
            stem = Path(name).stem
            if stem not in only:
                continue
            out = ["--out", f"{scratch}/{stem}", "--memory", budget, "--work", f"{scratch}/work-{stem}"]
            command = ["quantize", str(folder), "--recipe", name, *out, "--format", "json"]
            planned = json.loads(peak([*command, "--dry-run"])[2])["rows"][0]["memory_bytes"] / 1e9
            used, seconds, _, _ = peak(command, MORE * planned)
            print(f"{f'quantize --recipe {stem}':44} {used:8.2f} {planned:8.2f} {seconds:8.0f}", flush=True)
        if "eval" in only:
            command = [
                "eval",
                str(folder),
                *["--recipe", "w4", "--windows", "4", "--window", "512", "--memory", "3GB"],
            ]
            text, empty = Protocol(windows=4, window_tokens=512), without_weights(resolve(str(folder)))
            planned = memory_of([empty], [find_recipe("w4")], text)[OPENED] / 1e9
            used, seconds, _, _ = peak(command, MORE * planned)
            shown = "eval --recipe w4 --windows 4 --window 512"
            print(f"{shown:44} {used:8.2f} {planned:8.2f} {seconds:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing, measuring = verbs.add_parser("write"), verbs.add_parser("measure")
    for each in (writing, measuring):
        each.add_argument("folder", type=Path)
    writing.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    writing.add_argument("--layers", type=int)
    measuring.add_argument("--samples", type=int, default=128, help="calibration samples of 512 tokens")
    every = ["w4", "gptq-4bit", "eval"]
    measuring.add_argument("--only", nargs="+", choices=every, default=every)
    given = parser.parse_args()
    if given.verb == "write":
        write(given.folder, given.shape, given.layers)
    else:
        measure(given.folder, given.samples, given.only)


if __name__ == "__main__":
    main()

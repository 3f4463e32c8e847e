"""Our GGUF files in llama.cpp: the same perplexity as ours, over the same tokens?

Each recipe is written as a GGUF file. Our model (the fake one, in fp32), the file as transformers decodes it
and the file in llama.cpp score the same windows of WikiText-2; `llamacpp_relative` is how far llama.cpp's
perplexity is off ours. It rounds the inputs of its products to 8 bits, which the other two do not.
`same_tokens` says whether its tokenizer splits a sample of the text as ours does.

Run: python benchmarks/llamacpp.py PYTHON [MODEL] [--format json], where PYTHON has llama-cpp-python.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import bitassay
from bitassay.data.corpora import corpus
from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluation.quality import score_windows
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.gguf_reload import reload_difference
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.record.environment import environment

PROTOCOL = Protocol(window_tokens=512, windows=4)
COLUMNS = (
    "recipe",
    "stored_as",
    "bits_per_weight",
    "ours",
    "llamacpp",
    "llamacpp_relative",
    "logits_difference",
)


def recipe(name: str, overrides: list[dict] | None = None, **weights) -> Recipe:
    scheme = {"format": "int4", "granularity": "g32", "scale": "absmax"} | weights
    return Recipe.model_validate({"name": name, "weights": scheme, "overrides": overrides or []})


def only(match: str, **weights) -> dict:
    return {"match": match, "weights": {"granularity": "g256"} | weights}


RECIPES = (
    recipe("int8-g32", format="int8"),
    recipe("int4-g32"),
    recipe("int4-g32-asymmetric", symmetric=False),
    recipe("int3-g32-asymmetric", format="int3", symmetric=False),
    # Blocks of 256 need such rows; SmolLM2 has them in its down projections only.
    recipe(
        "int4-g32-and-super-blocks",
        [
            only("*.1[0-4].mlp.down_proj", format="int2", symmetric=False),
            only("*.1[5-9].mlp.down_proj", format="ternary"),
            only("*.mlp.down_proj", format="int3"),
            only("*.0.self_attn.o_proj", format="fp8_e4m3", granularity="channel"),
        ],
    ),
)


def perplexity(model, windows: torch.Tensor) -> float:
    scores = [found[BASE].nll.double().mean() for _, found in score_windows(model, {}, windows)]
    return torch.stack(scores).mean().exp().item()


def measured(base, windows: torch.Tensor, folder: Path) -> list[dict]:
    """A row for the model as it is and for each recipe, without llama.cpp's part."""
    rows = []
    for found in (None, *RECIPES):
        model = base if found is None else bitassay.quantize(base, found)
        path = folder / f"{'base' if found is None else found.name}.gguf"
        written = write_gguf(model, path)
        rows.append(
            {
                "recipe": path.stem,
                "stored_as": Counter(how.rpartition(" ")[2] for how in written.stored_as.elements()),
                "bits_per_weight": written.bits_per_weight,
                "relative_error": written.relative_error,
                "file": str(path),
                "ours": perplexity(model, windows),
                "logits_difference": reload_difference(model, path, windows[:1, :128]),
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def main(python: str, name: str = "smollm2-135m") -> dict:
    base = bitassay.load(name)
    windows, source = token_windows(base.tokenizer, PROTOCOL)
    text = corpus(PROTOCOL.corpus).text[:2000]
    tokens = base.tokenizer(text, add_special_tokens=False).input_ids
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(base, windows, Path(folder))
        job = {"files": [row["file"] for row in rows], "windows": windows.tolist(), "text": text}
        script = Path(__file__).parent / "peers" / "run_llamacpp.py"
        done = subprocess.run(
            [python, str(script)], input=json.dumps(job), capture_output=True, text=True, check=True
        )
    answer = json.loads(done.stdout)
    for row in rows:
        theirs = answer["files"][row.pop("file")]
        row["llamacpp"] = math.exp(sum(theirs["nll"]) / len(theirs["nll"]))
        row["llamacpp_relative"] = row["llamacpp"] / row["ours"] - 1
        row["same_tokens"] = theirs["tokens"] == tokens
    return {
        "model": name,
        "protocol": PROTOCOL.id,
        "corpus": source,
        "rows": rows,
        "llama_cpp_python": answer["version"],
        "environment": environment(),
    }


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("--format", "json")]
    result = main(*words)
    if "json" in sys.argv:
        print(json.dumps(result, indent=2))
    else:
        for row in result["rows"]:
            print("  ".join(f"{key}={row[key]}" for key in COLUMNS))

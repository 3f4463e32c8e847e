"""The support matrix: which engine loads what a recipe writes, how far off it is, and how fast.

Each recipe is written as every engine reads it: a folder for transformers (bitassay reads all of them) and
for vLLM (`--for vllm`), a GGUF file for llama.cpp. Each engine that is here loads it and scores the same
tokens of WikiText-2. `difference` is the mean distance of its log-probabilities of given tokens from those of
transformers in float32 with the quantized weights, in nats. Speeds are tokens in a second of CPU time, of the
process and of its children: `prefill` of those tokens in one piece, `decode` of some more; the ratios are
over those of the base model in transformers in bf16. `why` says why something is not written or not loaded.

Run: OMP_NUM_THREADS=1 python benchmarks/engines.py [MODEL] [--recipe w4 ...] [--engine llama.cpp ...]
[--format json]. vLLM is asked where BITASSAY_VLLM_PYTHON names an interpreter that has it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil

import bitassay
from bitassay.data.corpora import corpus
from bitassay.engines.engine import TRANSFORMERS, engine_of
from bitassay.errors import BitassayError
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.registry import GROUPED
from bitassay.quantization.export.save import save
from bitassay.record.environment import environment

TOKENS, DECODED = 128, 24
COLUMNS = ("recipe", "engine", "version", "loads", "difference", "prefill_ratio", "decode_ratio", "why")


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def speed(engine, ids: list[int]) -> dict[str, float]:
    """Tokens in a CPU second: reading `ids`, and decoding behind them."""
    engine.generate([ids[:8]], max_new_tokens=2)  # whatever is made at the first time
    start = cpu_seconds()
    engine.prefill([ids], [[1]])
    read = cpu_seconds() - start
    (made,) = engine.generate([ids[:8]], max_new_tokens=DECODED)
    decoded = cpu_seconds() - start - read
    return {"prefill": len(ids) / read, "decode": len(made.output_ids) / decoded}


def written(model, base, recipe: str | None, engine: str, folder: Path) -> Path:
    """Write a model for an engine."""
    path = folder / engine
    if engine == "llama.cpp":
        write_gguf(model, path.with_suffix(".gguf"))
        return path.with_suffix(".gguf")
    if recipe is None:
        base.save_pretrained(path)
        base.tokenizer.save_pretrained(path)
    else:
        save(model, path, **({"layout": GROUPED} if engine == "vllm" else {}))
    return path


def main(arguments: argparse.Namespace) -> dict:
    base = bitassay.load(arguments.model)
    ids = base.tokenizer(corpus("wikitext2-raw").text[:8000]).input_ids[:TOKENS]
    usual = speed(engine_of(bitassay.load(arguments.model, dtype="bfloat16")), ids)
    rows = []
    for recipe in (None, *arguments.recipe):
        model = base if recipe is None else bitassay.quantize(base, recipe=recipe)
        (wanted,) = engine_of(model).logprobs([ids[:1]], [ids[1:]])
        for name in arguments.engine:
            row = dict.fromkeys(COLUMNS) | {"recipe": recipe or "base", "engine": name, "loads": False}
            rows.append(row)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = written(model, base, recipe, name, Path(folder))
                    options = {"dtype": "bfloat16"} if name == TRANSFORMERS else {"engine": name}
                    engine = engine_of(bitassay.load(path, **options))
                    (found,) = engine.logprobs([ids[:1]], [ids[1:]])
                except BitassayError as error:
                    row["why"] = error.problem.replace(f"{folder}/", "")
                    print(*(row[column] for column in COLUMNS), sep="  ", flush=True)
                    continue
                said = engine.numerics()
                row |= {"loads": True, "version": said.get("engine_version", said["transformers"])}
                row["difference"] = float((found - wanted).abs().mean())
                row |= speed(engine, ids)
                row |= {f"{what}_ratio": row[what] / usual[what] for what in usual}
                del engine
            print(*(row[column] for column in COLUMNS), sep="  ", flush=True)
    return {"model": arguments.model, "tokens": TOKENS, "rows": rows, "environment": environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", nargs="*", default=["w8", "w4", "w3", "w2"])
    parser.add_argument("--engine", nargs="*", default=[TRANSFORMERS, "llama.cpp", "vllm"])
    parser.add_argument("--format", choices=["table", "json"], default="table")
    given = parser.parse_args()
    result = main(given)
    if given.format == "json":
        print(json.dumps(result, indent=2))

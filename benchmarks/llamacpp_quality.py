"""KL divergence in llama.cpp itself: our files beside those of llama-quantize with an importance matrix.

One base file in F16, one calibration text for both sides (windows of C4 as recipes read them, which
llama-imatrix reads as text), and the first `--chunks` pieces of 512 tokens of WikiText-2's raw test set. What
is finished is kept in the work folder: the same command goes on where it stopped.

    llama-quantize    types as named, `--token-embedding-type q8_0`; TYPE:PART for the matrices of that part
                      alone (`--tensor-type PART=TYPE`, all others in F16), such as Q2_K:ffn_down
    ours              recipes by name or file, embeddings in Q8_0; NAME=FILE.yaml calls one otherwise

Mean KL and its standard error are what llama-perplexity prints; it takes tokens as independent.

Run: python benchmarks/llamacpp_quality.py BIN --work DIR --types Q4_0 Q2_K --recipes gguf-q4_0 [--model M]
[--samples 16] [--tokens 512] [--chunks 16], BIN being llama.cpp's build/bin.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import bitassay
from bitassay.data.corpora import corpus
from bitassay.models.identity import tokenizer
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens

TRIES = 4  # a thread of llama-perplexity prints, and the program may end before it has
FIGURES = {
    "kl": r"Mean\s+KLD:\s+([-\d.]+) ±\s+([\d.]+)",
    "kl_99.9": r"99\.9%\s+KLD:\s+([\d.]+)()",
    "ppl": r"Mean PPL\(Q\)\s+:\s+([\d.]+) ±\s+([\d.]+)",
}


def ran(command: list[object], log: Path) -> str:
    """Run a program; its output is the log's, and an end with an error ends everything."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def prepared(said: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """Return the base file and the importance matrix."""
    base, text, matrix = work / "base.gguf", work / "calibration.txt", work / "imatrix.gguf"
    if not (base.exists() and text.exists()):
        model = bitassay.load(said.model)
        windows = calibration_tokens(model, Calibration(samples=said.samples, tokens=said.tokens))
        text.write_text("\n".join(tokenizer(model).decode(window) for window in windows))
        (work / "test.txt").write_text(corpus("wikitext2-raw").text[: 4000 * said.chunks])
        write_gguf(model, base, embeddings="F16")
    if not matrix.exists():
        ran(
            [said.bin / "llama-imatrix", "-m", base, "-f", text, "-c", said.tokens, "-t", 1, "-o", matrix],
            work / "imatrix.log",
        )
    return base, matrix


def theirs(said: argparse.Namespace, name: str, work: Path, base: Path, matrix: Path) -> Path:
    kind, _, part = name.partition(":")
    path = work / f"{name.replace(':', '-')}.gguf"
    how = ["--tensor-type", f"{part}={kind.lower()}"] if part else []
    if not path.exists():
        quantizer = [said.bin / "llama-quantize", "--imatrix", matrix]
        embeddings = "f16" if part else "q8_0"
        ran([*quantizer, *how, "--token-embedding-type", embeddings, base, path, "F16" if part else kind, 1],
            path.with_suffix(".log"))  # fmt: skip
    return path


def ours(said: argparse.Namespace, recipe: str, work: Path) -> Path:
    name, _, file = recipe.rpartition("=")
    path = work / f"ours-{name or Path(recipe).stem}.gguf"
    if not path.exists():
        command = [sys.executable, "-m", "bitassay.cli", "quantize", said.model, "--recipe", file]
        command += ["--gguf", path, "--no-check", "--work", path.with_suffix("")]
        ran([*command, "--embeddings", said.embeddings], path.with_suffix(".log"))
    return path


def measured(said: argparse.Namespace, path: Path, work: Path, logits: Path) -> dict[str, float]:
    log = path.with_suffix(".kl.log")
    text = log.read_text() if log.exists() else ""
    command = [said.bin / "llama-perplexity", "-m", path, "-f", work / "test.txt", "-c", 512, "-t", 1]
    command += ["--chunks", said.chunks, "--kl-divergence-base", logits, "--kl-divergence"]
    tries = 0
    while "Mean    KLD" not in text:
        if tries == TRIES:
            sys.exit(f"{path}: llama-perplexity printed no mean; see {log}")
        text, tries = ran(command, log), tries + 1
    found = {name: re.search(pattern, text) for name, pattern in FIGURES.items()}
    row: dict[str, float] = {"bytes": path.stat().st_size}
    for name, match in found.items():
        if match is not None:
            row[name] = float(match[1])
            if match[2]:
                row[f"{name}_error"] = float(match[2])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bin", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--embeddings", default="Q8_0")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    said = parser.parse_args()
    work = said.work
    work.mkdir(parents=True, exist_ok=True)
    base, matrix = prepared(said, work)
    logits = work / "logits.dat"
    if not (work / "logits.log").exists():
        command = [said.bin / "llama-perplexity", "-m", base, "-f", work / "test.txt", "-c", 512, "-t", 1]
        ran([*command, "--chunks", said.chunks, "--kl-divergence-base", logits], work / "logits.log")
    results = work / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    for name in (*said.recipes, *said.types):
        of_recipe = name in said.recipes
        path = ours(said, name, work) if of_recipe else theirs(said, name, work, base, matrix)
        rows[path.stem] = measured(said, path, work, logits)
        results.write_text(json.dumps(rows, indent=1))
        row = rows[path.stem]
        size, error = f"{row['bytes'] / 1e6:.1f} MB", f"{1.96 * row['kl_error']:.4f}"
        tail = f"99.9 % {row['kl_99.9']:.2f}  ppl {row['ppl']:.2f}"
        print(f"{path.stem:28} {size:>10}  KL {row['kl']:.4f} ± {error}  {tail}", flush=True)


if __name__ == "__main__":
    main()

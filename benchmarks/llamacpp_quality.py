"""KL divergence in llama.cpp itself: our files beside those of llama-quantize with an importance matrix.

One base file in F16, one calibration text for both sides (windows of C4 as recipes read them, which
llama-imatrix reads as text), and the first `--windows` windows of `--context` tokens of WikiText-2's raw test
set. llama-perplexity judges the second half of each window. What is finished is kept in the work folder: the
same command goes on where it stopped.

    llama-quantize    types as named, `--token-embedding-type q8_0`; TYPE:PART for the matrices of that part
                      alone (`--tensor-type PART=TYPE`, all others in F16), such as Q2_K:ffn_down
    ours              recipes by name or file, embeddings in Q8_0; NAME=FILE.yaml calls one otherwise, and
                      RECIPE@TYPE takes the type of each tensor from llama-quantize's file (`--like`)

Intervals are over windows, never tokens: a window's own mean follows from the running means that
llama-perplexity prints, to 0.00001 times the window's number. Two files are compared window by window. Files
of llama-quantize that are more than MOST_BYTES times as large as one of ours are not compared with it.

Run: python benchmarks/llamacpp_quality.py BIN --work DIR --types Q4_0 Q2_K --recipes gguf-q4_0 [--model M]
[--samples 128] [--context 1024] [--windows 16] [--speed], BIN being llama.cpp's build/bin. What is in
`--results FILE.json` is shown: alone, without BIN, as tables and with `--picture FILE.png` as a plot.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import matplotlib as mpl
from matplotlib.figure import Figure

import bitassay
from bitassay.data.corpora import corpus
from bitassay.evaluation.statistics import Interval, log_difference_interval, log_interval, mean_of
from bitassay.models.identity import tokenizer
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.gguf_like import types_of
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.report.figures.drawing import COLOURS, STYLE, label_points, write_png

Row = dict[str, Any]

TRIES = 4  # a thread of llama-perplexity prints, and the program may end before it has
MOST_BYTES = 1.2
LETTERS_A_TOKEN = 8  # of the test text, at most
FIGURES = {
    "kl": r"Mean\s+KLD:\s+([-\d.]+)",
    "kl_99.9": r"99\.9%\s+KLD:\s+([\d.]+)",
    "ppl": r"Mean PPL\(Q\)\s+:\s+([\d.]+)",
    "ppl_base": r"Mean PPL\(base\)\s+:\s+([\d.]+)",
}
# chunk, PPL, ln of its ratio, KL, each with an error
WINDOW = re.compile(r"^\s*(\d+)\s+[\d.]+ ± +[\d.]+\s+[-\d.]+ ± +[\d.]+\s+([-\d.]+) ± ", re.MULTILINE)


class Failed(Exception):
    """A program ended with an error."""


def ran(command: list[object], log: Path) -> str:
    """Run a program; its output is the log's. Raises Failed where it ends with an error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def prepared(said: argparse.Namespace, work: Path) -> tuple[Path, Path, Path]:
    """Return the base file, the importance matrix and the base's log-probabilities."""
    work.mkdir(parents=True, exist_ok=True)
    base, text, matrix = work / "base.gguf", work / "calibration.txt", work / "imatrix.gguf"
    logits, done = work / "logits.dat", work / "logits.log"
    if not (base.exists() and text.exists()):
        model = bitassay.load(said.model)
        windows = calibration_tokens(model, Calibration(samples=said.samples, tokens=said.tokens))
        text.write_text("\n".join(tokenizer(model).decode(window) for window in windows))
        letters = LETTERS_A_TOKEN * said.context * said.windows
        (work / "test.txt").write_text(corpus("wikitext2-raw").text[:letters])
        write_gguf(model, base, embeddings="F16")
    if not matrix.exists():
        command = [said.bin / "llama-imatrix", "-m", base, "-f", text, "-c", said.tokens]
        ran([*command, "-t", said.threads, "-o", matrix], work / "imatrix.log")
    if not done.exists():
        ran([*perplexity(said, base, work), "--kl-divergence-base", logits], work / "logits.part.log")
        (work / "logits.part.log").rename(done)
    return base, matrix, logits


def perplexity(said: argparse.Namespace, path: Path, work: Path) -> list[object]:
    command = [said.bin / "llama-perplexity", "-m", path, "-f", work / "test.txt", "-t", said.threads]
    return [*command, "-c", said.context, "--chunks", said.windows]


def theirs(said: argparse.Namespace, name: str, work: Path, base: Path, matrix: Path) -> Path:
    kind, _, part = name.partition(":")
    path = work / f"{name.replace(':', '-')}.gguf"
    how = ["--tensor-type", f"{part}={kind.lower()}"] if part else []
    if not path.exists():
        begun = path.with_suffix(".part")
        quantizer = [said.bin / "llama-quantize", "--imatrix", matrix]
        embeddings = "f16" if part else "q8_0"
        ran([*quantizer, *how, "--token-embedding-type", embeddings, base, begun, "F16" if part else kind,
             said.threads], path.with_suffix(".log"))  # fmt: skip
        begun.rename(path)
    return path


def ours(said: argparse.Namespace, recipe: str, work: Path, base: Path, matrix: Path) -> Path:
    recipe, _, like = recipe.partition("@")
    name, _, file = recipe.rpartition("=")
    path = work / f"ours-{name or Path(recipe).stem}{f'-like-{like}' if like else ''}.gguf"
    if not path.exists():
        command = [sys.executable, "-m", "bitassay.cli", "quantize", said.model, "--recipe", file]
        command += ["--gguf", path, "--no-check", "--work", path.with_suffix("")]
        if like:
            command += ["--like", theirs(said, like, work, base, matrix)]
        else:
            command += ["--embeddings", said.embeddings]
        ran(command, path.with_suffix(".log"))
    return path


def window_means(text: str) -> list[float]:
    """Return each window's own mean, from the running means that llama-perplexity prints."""
    running = {int(number): float(mean) for number, mean in WINDOW.findall(text)}
    sums = [0.0, *(number * running[number] for number in sorted(running))]
    return [after - before for before, after in itertools.pairwise(sums)]


def measured(said: argparse.Namespace, path: Path, work: Path, logits: Path) -> Row:
    log = path.with_suffix(".kl.log")
    text = log.read_text() if log.exists() else ""
    command = [*perplexity(said, path, work), "--kl-divergence-base", logits, "--kl-divergence"]
    tries = 0
    while "Mean    KLD" not in text or len(window_means(text)) != said.windows:
        if tries == TRIES:
            sys.exit(f"{path}: llama-perplexity did not print every window's mean; see {log}")
        text, tries = ran(command, log), tries + 1
    row: Row = {"bytes": path.stat().st_size, "bits": bits_of_matrices(path), "windows": window_means(text)}
    return row | {name: float(found[1]) for name, key in FIGURES.items() if (found := re.search(key, text))}


def bits_of_matrices(path: Path) -> float:
    """Return the stored bits of a weight, of the decoder layers' matrices."""
    weights, size = 0, 0.0
    for name, (kind, shape) in types_of(path).items():
        if name.startswith("blk.") and len(shape) > 1:
            run, run_bytes = gguf.GGML_QUANT_SIZES[kind]
            count = shape[0] * shape[1]
            weights, size = weights + count, size + 8 * count * run_bytes / run
    return size / weights


def speeds(said: argparse.Namespace, path: Path) -> Row:
    """Return the tokens a second of a prompt of 512 and of 64 tokens after it, by llama-bench."""
    command = [said.bin / "llama-bench", "-m", path, "-t", said.threads, "-p", 512, "-n", 64, "-r", 3]
    text = ran([*command, "-o", "json"], path.with_suffix(".bench.log"))
    found = json.loads(text[text.index("[") : text.rindex("]") + 1])
    return {("prefill" if each["n_prompt"] else "decode"): each["avg_ts"] for each in found}


def tables(rows: dict[str, Row]) -> str:
    """Return all files by bytes, and ours less theirs where theirs are not much larger, as Markdown."""
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["bytes"]))
    timed = any("decode" in row for row in rows.values())
    titles = ["file", "MB", "bits", "KL [95 %]", "KL, 99.9 %", "perplexity"]
    titles += ["prefill", "decode"] if timed else []
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, row in rows.items():
        cells = [name, f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.2f}"]
        cells += [f"{row['kl']:.4f} {shown(log_interval(mean_of(row['windows'])))}"]
        cells += [f"{row['kl_99.9']:.2f}", f"{row['ppl']:.2f}"]
        cells += [f"{row[key]:.0f}" if key in row else "" for key in ("prefill", "decode")] if timed else []
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| ours | of llama-quantize | bytes, theirs over ours | KL, ours less theirs [95 %] | |"]
    lines.append("|---|---|---:|---:|---|")
    for name, row in rows.items():
        for other, rival in rows.items() if is_ours(name) else ():
            if is_ours(other) or rival["bytes"] > MOST_BYTES * row["bytes"]:
                continue
            ends = log_difference_interval(mean_of(rival["windows"]), mean_of(row["windows"]))
            verdict = "" if ends is None or ends[0] <= 0 <= ends[1] else "lower" if ends[1] < 0 else "higher"
            difference = f"{row['kl'] - rival['kl']:+.4f} {shown(ends)}"
            cells = [name, other, f"{rival['bytes'] / row['bytes']:.3f}", difference, verdict]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(ends: Interval) -> str:
    return "" if ends is None else f"[{ends[0]:.4f}, {ends[1]:.4f}]"


def is_ours(name: str) -> bool:
    return name.startswith("ours-")


@mpl.rc_context(STYLE)
def pareto_figure(rows: dict[str, Row], title: str) -> Figure:
    """Draw KL against bytes; of each side the files that no other of it beats in both are joined."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="MB", ylabel="KL divergence to F16", yscale="log", title=title)
    labels = []
    for mine, label, colour, marker in (
        (False, "llama-quantize, importance matrix", COLOURS[0], "o"),
        (True, "bitassay", COLOURS[2], "D"),
    ):
        points = {n: (row["bytes"] / 1e6, row["kl"]) for n, row in rows.items() if is_ours(n) == mine}
        front = sorted(p for p in points.values() if not any(better(o, p) for o in points.values()))
        if points:
            axes.plot(*zip(*points.values(), strict=True), marker, color=colour, label=label)
            axes.plot(*zip(*front, strict=True), "-", color=colour, alpha=0.6)
        labels += [(*point, name.removeprefix("ours-")) for name, point in points.items()]
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    label_points(axes, labels)
    return figure


def better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bin", type=Path, nargs="?")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--embeddings", default="Q8_0")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--picture", type=Path)
    said = parser.parse_args()
    work = said.work
    results = said.results or work / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    if said.types or said.recipes or said.speed:
        base, matrix, logits = prepared(said, work)
    for name in (*said.recipes, *said.types):
        of_recipe = name in said.recipes
        try:
            make = ours if of_recipe else theirs
            path = make(said, name, work, base, matrix)
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        row = measured(said, path, work, logits)
        rows[path.stem] = rows.get(path.stem, {}) | row
        results.write_text(json.dumps(rows, indent=1))
        print(f"{path.stem}: {row['bytes'] / 1e6:.1f} MB, KL {row['kl']:.4f}", flush=True)
    for name in rows if said.speed else ():
        rows[name] |= speeds(said, work / f"{name}.gguf")
        results.write_text(json.dumps(rows, indent=1))
    print(tables(rows))
    if said.picture is not None:
        write_png(pareto_figure(rows, f"{said.model}, in llama.cpp"), said.picture)


if __name__ == "__main__":
    main()

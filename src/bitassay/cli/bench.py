"""`bitassay bench`: speed of models and of products, compared with the limits of the machine."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError

bench = App(
    name="bench",
    help="Time models and compare them with the limits of the machine; `bench matmul` times products.",
)


@bench.default
def models(
    model: options.Model,
    *,
    recipe: options.Recipes | None = None,
    candidate: Annotated[
        options.Candidates | None,
        Parameter(
            help="Another model, such as a quantized folder or a .gguf file; ENGINE:MODEL names who runs it, "
            "such as llama.cpp:small.gguf or vllm:small/. May be repeated."
        ),
    ] = None,
    engine: str = "transformers",
    controls: options.Controls = True,
    batches: options.Counts | None = None,
    contexts: options.Counts | None = None,
    prompt_tokens: options.Count = 128,
    new_tokens: options.Count = 16,
    repeats: options.Count = 5,
    threads: options.Count | None = None,
    compute: options.Compute16 = options.Compute16(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Time MODEL and packed quantized models in turn: first token, prefill, decode and memory, by batch size
    and by context length. Each speed is also given as a share of the bandwidth or of the matrix peak, which
    are measured in the same run.

    A recipe with replication is compared with its controls, plain recipes of equal bits and of equal work. An
    interrupted command continues when it is run again. A cell that does not fit the model's positions or the
    machine's memory is skipped, with the reason; exit status 1 where every cell is skipped.

    Args:
        engine: Who runs MODEL, and candidates that name nobody: transformers, llama.cpp (of .gguf files),
            vllm (of folders), or a plug-in that says times. These read files in their own types, and show one
            clock: their own. --dtype and --attention are of transformers.
        batches: Batch sizes (default: 1 2 4 8 16 32).
        contexts: Lengths of a single prompt (default: 512 1024 2048 4096 8192).
        prompt_tokens: Tokens of each prompt of a batch.
        new_tokens: Tokens decoded greedily after each prompt.
        repeats: Rounds; each of them times everything once.
        threads: Threads of each process (default: torch's own choice).
    """
    from bitassay.models.source import engine_and_model

    check_words([model, *(engine_and_model(name)[1] for name in candidate or ())], recipe, folder=output.out)
    compute.check_engine(engine, recipe)
    from bitassay.bench.models import BATCHES, CONTEXTS, bench
    from bitassay.report.findings import busy, machine_line

    loading: dict[str, Any] = compute.options
    if engine != "transformers":
        loading["device"] = "cpu"
    with show_progress() as progress:
        run, folder = bench(
            compute.of(model),
            recipe or [],
            candidates=tuple(candidate or ()),
            engine=engine,
            controls=controls,
            batches=BATCHES if batches is None else tuple(batches),
            contexts=CONTEXTS if contexts is None else tuple(contexts),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            out=output.out,
            progress=progress,
            **loading,
        )
    for line in (machine_line(run), busy(run)):
        if line:
            print(line, file=sys.stderr)
    output.show_run(run, folder)
    return 1 if all("skipped" in row for row in run["rows"]) else 0


@bench.command
def matmul(
    *,
    shapes: options.Names | None = None,
    draws: options.Count = 4,
    repeats: options.CountFromZero = 5,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: Path | None = None,
    output: options.Output = options.Output(),
) -> int:
    """Measure the error of INT8 and FP8 products with one scale for each row or for the tensor, and their
    speed as a ratio to fp32 and bf16 products. The table also shows the errors that the INT8/FP8 report
    states.

    Args:
        shapes: Rows and columns of the left matrix; the right one is square (default: 16x512 100x1024
            4096x4096).
        draws: Random matrices that errors are averaged over.
        repeats: Rounds of timing; 0 measures no speed.
        out: Also write an HTML page to this file.
    """
    check_words(file=out)
    from bitassay.bench.matmul import SHAPES, matmul
    from bitassay.report.pages import write_report

    chosen = SHAPES if shapes is None else [_shape(text) for text in shapes]
    where = options.chosen_device(device)
    with show_progress() as progress:
        run = matmul(chosen, draws=draws, repeats=repeats, seed=seed, device=where, progress=progress)
    if out is not None:
        write_report(run, out)
        print(f"report: {out}", file=sys.stderr)
    output.emit_run(run)
    return 0


def _shape(text: str) -> tuple[int, int]:
    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise BitassayError(f"{text!r} is not a shape", "rows and columns, such as 16x512")
    return int(rows), int(columns)

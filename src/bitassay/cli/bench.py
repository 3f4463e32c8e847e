"""`bitassay bench`: how fast models and products run, beside what the machine could do."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from bitassay.cli.output import Format, emit_run
from bitassay.cli.parameters import (
    AS_IT_IS,
    Count,
    CountOrNone,
    Counts,
    Device,
    Dtype,
    Loading,
    Names,
    Seed,
)

bench = App(
    name="bench",
    help="Time models beside what the machine could do; `bench matmul`: error and speed of products.",
)


@bench.default
def models(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    candidate: Annotated[list[str] | None, Parameter(negative=())] = None,
    controls: bool = True,
    batches: Counts | None = None,
    contexts: Counts | None = None,
    prompt_tokens: Count = 128,
    new_tokens: Count = 16,
    repeats: Count = 5,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Count | None = None,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Time MODEL and packed quantized models in turn: first token, prefill, decode, memory, by batch size and
    by context length, and the share of what the machine could do (its bandwidth and matrix peak are measured
    in the same run). A recipe with replication comes with its controls, plain recipes of equal bits and of
    equal work, and its speed over theirs.

    Writes run.json and report.html into a run folder. Interrupted, the same command goes on. What the model
    has no positions for, or the machine no memory, is skipped and says so; exit status 1 where all is.

    Args:
        model: The base model: a name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: MODEL quantized by this recipe, packed; may be repeated.
        candidate: Another model, such as a folder that `bitassay quantize` wrote; may be repeated.
        controls: Add the controls of recipes with replication.
        batches: Batch sizes (default: 1 2 4 8 16 32).
        contexts: Lengths of one prompt (default: 512 1024 2048 4096 8192).
        prompt_tokens: Tokens of each prompt of a batch.
        new_tokens: Greedy steps behind the prompts.
        repeats: Rounds over everything.
        dtype: Of the dense parts, and of the base model.
        device: cpu, cuda or another that torch knows.
        threads: Of each process (default: torch's own choice).
        out: Run folder (default: runs/bench-MODEL-ID).
        format: What to print on stdout; json has every measurement.
    """
    from bitassay.cli.checks import check_words

    check_words([model, *(candidate or ())], recipe, folder=out)
    from bitassay.bench.models import BATCHES, CONTEXTS, bench
    from bitassay.cli.progress import show_progress
    from bitassay.report.findings import busy, machine_line

    with show_progress() as progress:
        run, folder = bench(
            loading.of(model),
            recipe or [],
            candidates=tuple(candidate or ()),
            controls=controls,
            batches=BATCHES if batches is None else tuple(batches),
            contexts=CONTEXTS if contexts is None else tuple(contexts),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            dtype=dtype,
            device=device,
            threads=threads,
            out=out,
            progress=progress,
            **loading.options,
        )
    emit_run(run, format, folder / "report.html")
    for line in filter(None, (machine_line(run), busy(run))):
        print(line, file=sys.stderr)
    return 1 if all("skipped" in row for row in run["rows"]) else 0


@bench.command
def matmul(
    *,
    shapes: Names | None = None,
    draws: Count = 4,
    repeats: CountOrNone = 5,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Path | None = None,
    format: Format = "table",
) -> int:
    """Error of INT8 and FP8 products with a scale a row or a tensor, beside what the documents say, and their
    speed as a ratio to fp32 and bf16 products.

    Args:
        shapes: Rows and columns of the left side; the right one is square (default: 16x512 100x1024
            4096x4096).
        draws: Random matrices that errors are averaged over.
        repeats: Rounds of timing; 0 leaves speed out.
        seed: Of the matrices.
        device: cpu, cuda or another that torch knows.
        out: Write an HTML page here too.
        format: What to print on stdout.
    """
    from bitassay.bench.matmul import SHAPES, matmul
    from bitassay.cli.progress import show_progress
    from bitassay.record.files import check_place

    if out is not None:
        check_place(out)
    asked = SHAPES if shapes is None else [_shape(text) for text in shapes]
    with show_progress() as progress:
        run = matmul(asked, draws=draws, repeats=repeats, seed=seed, device=device, progress=progress)
    emit_run(run, format, out)
    return 0


def _shape(text: str) -> tuple[int, int]:
    from bitassay.errors import BitassayError

    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise BitassayError(f"{text!r} is not a shape", "rows and columns, such as 16x512")
    return int(rows), int(columns)

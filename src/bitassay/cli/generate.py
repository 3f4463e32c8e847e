"""`bitassay generate`: how far quantized models' own words are from the base model's."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit


def generate(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    candidate: Annotated[list[str] | None, Parameter(negative=())] = None,
    prompts: int = 32,
    prompts_file: Path | None = None,
    new_tokens: int = 64,
    batch: int = 8,
    dtype: str = "float32",
    out: Path | None = None,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "table",
) -> int:
    """Let MODEL and quantized models continue the same prompts greedily, and compare the texts: length of the
    equal prefix, first divergence, BLEU, ROUGE, with intervals over prompts.

    Writes run.json, report.html with all texts side by side, and ratings.csv for a person to fill in, into a
    run folder. Interrupted, the same command goes on. Needs the `generation` extra.

    Args:
        model: The base model: a name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: MODEL quantized by this recipe; may be repeated.
        candidate: Another model with the same vocabulary, such as a quantized folder; may be repeated.
        prompts: How many, evenly spaced over those that there are.
        prompts_file: Prompts of your own: a text file with one a line, or JSON lines (default: bundled ones).
        new_tokens: Tokens of an answer, at most.
        batch: Prompts that are continued together. Part of the plan: 16-bit arithmetic depends on it.
        dtype: Arithmetic of all models.
        out: Run folder (default: runs/generation-MODEL-ID).
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout; json has the texts too.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.report.generation import (
        GENERATION_COLUMNS,
        candidates,
        write_generation_report,
        write_rating_sheet,
    )
    from bitassay.studies.generation import generation

    with show_progress() as progress:
        run, folder = generation(
            model,
            recipe or [],
            candidates=tuple(candidate or ()),
            prompts=prompts,
            prompts_file=prompts_file,
            max_new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            out=out,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    write_generation_report(run, folder / "report.html")
    write_rating_sheet(run, folder / "ratings.csv")
    emit(candidates(run), GENERATION_COLUMNS, format, whole=run)
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return 0

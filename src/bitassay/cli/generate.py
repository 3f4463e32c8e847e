"""`bitassay generate`: how far quantized models' own words are from the base model's."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit_run
from bitassay.cli.parameters import AS_IT_IS, Count, Dtype, Loading, Seed


def generate(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    candidate: Annotated[list[str] | None, Parameter(negative=())] = None,
    prompts: Count = 32,
    prompts_file: Path | None = None,
    new_tokens: Count = 64,
    batch: Count = 8,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
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
        seed: Accepted by every verb; nothing here is drawn at random.
        out: Run folder (default: runs/generation-MODEL-ID).
        format: What to print on stdout; json has the texts too.
    """
    from bitassay.cli.checks import check_words

    check_words([model, *(candidate or ())], recipe, folder=out, texts=[prompts_file])
    from bitassay.cli.progress import show_progress
    from bitassay.report.pages import write_rating_sheet
    from bitassay.studies.generation import generation

    with show_progress() as progress:
        run, folder = generation(
            loading.of(model),
            recipe or [],
            candidates=tuple(candidate or ()),
            prompts=prompts,
            prompts_file=prompts_file,
            max_new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            out=out,
            progress=progress,
            **loading.options,
        )
    write_rating_sheet(run, folder / "ratings.csv")
    emit_run(run, format, folder / "report.html")
    return 0

"""`bitassay generate`: how far the texts of quantized models are from the base model's."""

from pathlib import Path

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress


def generate(
    model: options.Model,
    *,
    recipe: options.Recipes | None = None,
    candidate: options.Candidates | None = None,
    engine: str = "transformers",
    prompts: options.Count = 32,
    prompts_file: Path | None = None,
    new_tokens: options.Count = 64,
    batch: options.Count = 8,
    seed: options.UnusedSeed = 0,
    compute: options.Compute = options.Compute(),
    output: options.RunOutput = options.RunOutput(),
) -> int:
    """Let MODEL and quantized models continue the same prompts greedily, and compare the texts: length of the
    equal prefix, first divergence, BLEU and ROUGE, with intervals over prompts.

    The run folder also gets ratings.csv for a person to fill in, and its page shows all texts. An interrupted
    command continues when it is run again. Needs the extra `generation`.

    Args:
        engine: Who runs the candidates: transformers, llama.cpp (.gguf files), vllm, or a plug-in. MODEL runs
            in transformers, on the same token ids; it may be a candidate too, to compare two engines.
        prompts: How many prompts, evenly spaced over those available.
        prompts_file: Prompts of your own: a text file with one on each line, or JSON lines (default: bundled
            prompts).
        new_tokens: Tokens of an answer, at most.
        batch: Prompts that are continued together. Results in 16-bit arithmetic depend on it.
    """
    check_words([model, *(candidate or ())], recipe, folder=output.out, texts=[prompts_file])
    compute.check_engine(engine, recipe)
    from bitassay.report.pages import write_rating_sheet
    from bitassay.studies.generation import generation

    with show_progress() as progress:
        run, folder = generation(
            compute.of(model),
            recipe or [],
            candidates=tuple(candidate or ()),
            engine=engine,
            prompts=prompts,
            prompts_file=prompts_file,
            max_new_tokens=new_tokens,
            batch=batch,
            out=output.out,
            progress=progress,
            **compute.options,
        )
    write_rating_sheet(run, folder / "ratings.csv")
    output.show_run(run, folder)
    return 0

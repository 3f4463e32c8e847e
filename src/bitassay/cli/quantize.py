"""`bitassay quantize`: a recipe and a model to a checkpoint folder, a GGUF file, or both."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.options import Bounded, Count, Flag, Output, RunOutput
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.record.files import check_folder
from bitassay.report.tables import Column, number, significant, size

SIZES = (
    Column("recipe", "recipe", align="left"),
    Column("layout", "layout", align="left"),
    Column("bits_per_weight", "bits/weight", number(3)),
    Column("size_bytes", "size", size),
    Column("file_bytes", "files", size),
)
Engine = Annotated[Literal["vllm", "llama.cpp", "transformers"], Parameter(name="--for")]
PLANNED_COLUMNS = (
    Column("work_bytes", "work", size),
    Column("memory_bytes", "memory", size),
    Column("way", "read", align="left"),
    Column("planned_seconds", "seconds", number(0)),
)
WRITTEN_COLUMNS = (
    Column("seconds", "seconds", number(1)),
    Column("max_logits_difference", "largest logits\ndifference", significant(3)),
)


@options.group
class Storage(Bounded):
    """How MODEL is loaded, and in which dtype it is stored."""

    dtype: options.StateDtype = "float32"
    """Dtype of everything that is not quantized. In float32 the checkpoint loads exactly; in 16 bits it is
    smaller, and transformers rounds the scales once more."""


def quantize(
    model: options.Model,
    *,
    recipe: options.RecipeName | None = None,
    out: Path | None = None,
    gguf: Path | None = None,
    layout: str | None = None,
    engine: Engine | None = None,
    embeddings: str | None = None,
    like: Path | None = None,
    work: Path | None = None,
    check: bool = True,
    dry_run: Flag = False,
    analyze: Flag = False,
    samples: Count | None = None,
    each_matrix: Flag = False,
    storage: Storage = Storage(),
    output: Output = Output(),
) -> int:
    """Quantize MODEL by a recipe and save it as a folder, as a GGUF file for llama.cpp, or as both.

    vLLM loads the folder where the compressed-tensors format is exact, and plain transformers where there are
    no zero points or --layout compressed-tensors asks for it; otherwise only bitassay does. Run again, the
    same command checks what is finished and does the rest: a calibrated recipe continues after the last
    finished layer.

    Args:
        out: The folder to write. It must be new or empty.
        gguf: The file to write for llama.cpp. It must be new.
        layout: How the folder stores codes: vllm (compressed-tensors with packed zero points),
            compressed-tensors (for plain transformers), bitassay or the layout of a plug-in (default: vllm
            where that is exact and there are zero points, else compressed-tensors, otherwise bitassay).
        engine: Refuse, before any work, what this engine would not load, and write the folder as it reads it.
            llama.cpp reads the --gguf file; vllm and transformers read the --out folder. Which widths have
            kernels depends on the build of vllm, and is not checked.
        embeddings: The type of the embedding and the head in the --gguf file: Q8_0, Q6_K to Q2_K, Q5_1, Q5_0,
            Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q2_0, Q1_0, TQ2_0, TQ1_0, F16, BF16 or F32 (default: Q8_0 with a
            recipe, 16 bits without).
        like: A GGUF file of the same model: the --gguf file gets the type of each of its tensors, so the same
            bytes, with the codes that the recipe's solvers find on these grids. Of Q1_0, Q2_0, TQ1_0, TQ2_0,
            Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, IQ4_XS and Q2_K to Q6_K matrices, and plain ones.
        work: Where a calibrated recipe keeps its finished layers and its result (default: in the cache, where
            other commands find the result too).
        check: Load the written files, with plain transformers where it can, and compare the logits.
        dry_run: Estimate the files, the disk that the work takes meanwhile, the memory, and the time by what
            is timed on this machine now, and stop. Without --out and --gguf, those of a folder.
        analyze: Write no model. Show how hard each layer and each matrix is to quantize in the recipe's
            formats: a table, a heat map and a page in a run folder (--out, or runs/analysis-MODEL-RECIPE-ID).
        samples: With --analyze, the number of windows of the calibration text that are measured (default: 8).
            It does not change the number with which the recipe itself calibrates.
        each_matrix: With --analyze, also measure the divergence of each matrix, not only of each layer.
    """
    if analyze:
        if gguf is not None or dry_run:
            raise BitassayError(
                "--analyze writes no model, so --gguf and --dry-run have no effect", "leave them out"
            )
    elif samples is not None or each_matrix:
        raise BitassayError(
            "--samples and --each-matrix belong to --analyze",
            "add --analyze, or set in the recipe: calibration: {samples: 128, tokens: 512}",
        )
    elif recipe is None and (gguf is None or out is not None or engine is not None or dry_run):
        raise BitassayError(
            "without a recipe only the model as it is can be written, and only as a GGUF file",
            "--recipe R, or --gguf FILE alone",
        )
    elif out is None and gguf is None and not dry_run:
        raise BitassayError("no place to write to is named", "--out FOLDER, --gguf FILE, or both")
    elif out is None and layout is not None and gguf is not None:
        raise BitassayError("--layout belongs to the folder", "add --out FOLDER, or leave it out")
    plans_folder = dry_run and gguf is None
    if engine is not None and (gguf if engine == "llama.cpp" else out or plans_folder or None) is None:
        needed = "--gguf FILE" if engine == "llama.cpp" else "--out FOLDER"
        raise BitassayError(f"{engine} reads nothing that would be written", f"add {needed}")
    if engine is not None and layout is not None:
        raise BitassayError("--for chooses the layout", "leave out --layout or --for")
    if embeddings is not None and gguf is None:
        raise BitassayError("--embeddings is of the GGUF file", "add --gguf FILE, or leave it out")
    if like is not None and (gguf is None or out is not None or recipe is None or embeddings is not None):
        raise BitassayError(
            "--like is of the GGUF file alone, whose types it names, and needs a recipe for its solvers",
            "--like FILE --gguf NEW --recipe gguf-q4_0, without --out and --embeddings",
        )
    check_words([model], [recipe], folder=out, file=gguf)
    check_folder(work)
    if analyze:
        if recipe is None:
            raise BitassayError("--analyze needs a recipe, whose formats it measures", "--recipe R")
        return _analyze(model, recipe, samples or 8, each_matrix, storage, RunOutput(output.format, out))
    from bitassay.models.source import resolve
    from bitassay.quantization.export.registry import LAYOUTS
    from bitassay.quantization.recipe.recipe import Recipe, find_recipe
    from bitassay.studies.checkpoint import planned, write_base, written
    from bitassay.studies.checkpoint_job import CheckpointJob, fitted, like_file

    if embeddings is not None:
        from bitassay.quantization.export.gguf_round import check_type

        check_type(embeddings)
    elif recipe is not None:
        embeddings = "Q8_0"
    if layout is not None:
        LAYOUTS[layout]  # refuses an unknown name
    wanted = Recipe(name="base", weights=None) if recipe is None else find_recipe(recipe)
    with show_progress() as progress:
        name = storage.of(model)
        source = resolve(name, progress)
        budget, loading = storage.memory, storage.options
        job = CheckpointJob(name, source, wanted, out, gguf, layout, work, check, budget, loading)
        job = replace(job, embeddings=embeddings, engine=engine)
        if like is not None:
            job = like_file(job, like)
        elif recipe is not None:
            job = fitted(job, progress)
        if recipe is None:
            rows = [write_base(job, progress)]
        else:
            rows = planned(job, progress) if dry_run else written(job, progress)
    last = PLANNED_COLUMNS if dry_run else WRITTEN_COLUMNS
    output.emit((rows, (*SIZES, *last)))
    return 0


def _analyze(
    model: str, recipe: str, samples: int, each_matrix: bool, storage: Storage, output: RunOutput
) -> int:
    """Analyze, write run.json, report.html and heat-map.png into the run folder, and print the layers."""
    from bitassay.quantization.analysis import AnalysisPlan, analyze
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.calibration import Calibration
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.report.pages import write_heat_map

    analyzed = find_recipe(recipe)
    text = (analyzed.calibration or Calibration()).model_copy(update={"samples": samples})
    with show_progress() as progress:
        trust = storage.trust_remote_code
        check_fit(storage.of(model), [analyzed], trust_remote_code=trust, progress=progress)
        base = storage.load(model, progress=progress)
        plan = AnalysisPlan(text, each_matrix)
        run, folder = analyze(base, analyzed, plan, out=output.out, progress=progress)
    write_heat_map(run, folder / "heat-map.png")
    output.show_run(run, folder)
    return 0

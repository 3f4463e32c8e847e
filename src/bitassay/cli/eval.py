"""`bitassay eval`: perplexity and divergence, or tasks, without the rest of an assay."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bitassay.cli.output import Format, emit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.record.progress import Progress


def eval(
    model: str,
    *,
    recipe: Annotated[list[str] | None, Parameter(negative=())] = None,
    against: str | None = None,
    windows: int | None = 16,
    window: int = 2048,
    tasks: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    out: Path | None = None,
    dtype: str = "float32",
    seed: int = 0,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "table",
) -> int:
    """Perplexity of MODEL; with --recipe or --against also divergence, with paired intervals.

    With --tasks, the share of questions answered rightly instead, beside the base model's, with tests.
    Finished parts are kept in a run folder: interrupted, the same command goes on.

    Args:
        model: A name from `bitassay models list`, a folder (a quantized one too), a .gguf file or a
            hub id.
        recipe: Evaluate MODEL quantized by this recipe, against MODEL itself; may be repeated.
        against: Compare MODEL with this model instead; both must share a vocabulary.
        windows: How many windows of WikiText-2, evenly spaced; 0 means all of them, the published
            protocol.
        window: Tokens in a window.
        tasks: Tasks of lm-eval, with commas: mmlu, mmlu_generative, hellaswag, arc_challenge, mmlu_anatomy or
            any other by its name.
        limit: Ask so many items of each task (of each subject of MMLU), evenly spaced.
        shots: Examples shown before each question (default: 5 for MMLU, else the task's own).
        out: Run folder of --tasks (default: runs/tasks-MODEL-ID).
        dtype: Arithmetic of both models.
        seed: Of the bootstrap of perplexities.
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.data.windows import Protocol
    from bitassay.errors import BitassayError
    from bitassay.evaluate.compare import evaluate
    from bitassay.models.load import load
    from bitassay.quantize.pipeline import quantize_once
    from bitassay.report.assay import QUALITY_COLUMNS

    if recipe and against:
        raise BitassayError("--recipe and --against both name a comparison", "give one of them")
    protocol = Protocol(window_tokens=window, windows=windows or None)
    if tasks is None and not (limit is shots is out is None):
        raise BitassayError("--limit, --shots and --out belong to tasks", "--tasks hellaswag")
    with show_progress() as progress:
        loaded = load(model, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code)
        if tasks is not None:
            other = None
            if against:
                other = load(against, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code)
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            return _tasks(
                (model, loaded), recipe or [], (against, other), names, limit, shots, out, format, progress
            )
        if recipe:
            pairs = [(name, quantize_once(loaded, name, progress=progress), loaded) for name in recipe]
        elif against:
            pairs = [
                (
                    model,
                    loaded,
                    load(against, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code),
                )
            ]
        else:
            pairs = [(model, loaded, None)]
        found = [
            (n, evaluate(m, against=b, protocol=protocol, seed=seed, progress=progress)) for n, m, b in pairs
        ]
    rows = [
        {"recipe": name, "protocol": e.protocol, "against": e.base, **e.quality.to_dict()}
        for name, e in found
    ]
    emit(rows, QUALITY_COLUMNS, format)
    return 0


def _tasks(
    model: "tuple[str, PreTrainedModel]",
    recipes: list[str],
    against: "tuple[str | None, PreTrainedModel | None]",
    tasks: list[str],
    limit: int | None,
    shots: int | None,
    out: Path | None,
    format: Format,
    progress: "Progress",
) -> int:
    import sys

    from bitassay.bench.environment import environment
    from bitassay.evaluate.tasks import evaluate_tasks, loaded_candidate, quantized_candidate
    from bitassay.report.tasks import TASK_COLUMNS

    (name, loaded), (other_name, other) = model, against
    if other is not None and other_name is not None:
        candidates = [loaded_candidate(other, other_name), loaded_candidate(loaded, name)]
    else:
        base = loaded_candidate(loaded, "base" if recipes else name)
        candidates = [base, *(quantized_candidate(loaded, recipe, progress) for recipe in recipes)]
    run, folder = evaluate_tasks(
        candidates,
        tasks,
        limit=limit,
        shots=shots,
        out=out,
        environment=environment(),
        progress=progress,
    )
    emit(run["rows"], TASK_COLUMNS, format, whole=run)
    print(f"run: {folder}", file=sys.stderr)
    return 0

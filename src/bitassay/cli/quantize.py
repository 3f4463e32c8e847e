"""`bitassay quantize`: a recipe and a model to a checkpoint folder, a GGUF file, or both."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, Count, Loading, StateDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.models.source import Source
    from bitassay.quantization.export.card import Card
    from bitassay.quantization.export.save import Layout
    from bitassay.quantization.recipe.recipe import Recipe
    from bitassay.record.progress import Progress


def quantize(
    model: str,
    *,
    recipe: str,
    out: Path | None = None,
    gguf: Path | None = None,
    layout: Literal["compressed-tensors", "bitassay"] | None = None,
    work: Path | None = None,
    dtype: StateDtype = "float32",
    check: bool = True,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    analyze: Annotated[bool, Parameter(negative=())] = False,
    samples: Count | None = None,
    each_matrix: Annotated[bool, Parameter(negative=())] = False,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Quantize MODEL by a recipe and save it as a folder, as a GGUF file for llama.cpp, or as both.

    Wherever the compressed-tensors format is exact, plain transformers loads the folder, else bitassay alone.
    Run again, the same command checks what is finished, says so, and does the rest: a calibrated recipe goes
    on after the last layer that was finished.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: A shipped recipe or a YAML file.
        out: The folder to write; it must not exist or be empty.
        gguf: The file to write for llama.cpp; it must not exist.
        layout: How the folder stores codes. Without it, compressed-tensors wherever that is exact.
        work: Where a calibrated recipe keeps its finished layers and its result. Without it, in the cache,
            where other commands find the result too.
        dtype: What is not quantized is stored in this dtype. In float32 the checkpoint loads exactly;
            in 16 bits it is smaller, and transformers rounds the scales once more.
        check: Load what was written, with plain transformers where it can, and compare its logits.
        dry_run: Estimate the files and the memory, and stop.
        analyze: Write no model; say how hard each layer and matrix is to quantize by the recipe's formats, as
            a table, a heat map and a page, in a run folder (--out, or runs/analysis-MODEL-RECIPE-ID).
        samples: With --analyze, how many windows of the calibration text are looked at (8). How many a recipe
            calibrates with it says itself.
        each_matrix: With --analyze, measure the divergence of each matrix too, not of each layer only.
        format: What to print on stdout.
    """
    from bitassay.cli.checks import check_words
    from bitassay.errors import BitassayError
    from bitassay.record.files import check_folder

    if analyze:
        if gguf is not None or dry_run:
            raise BitassayError(
                "--analyze writes no model, so --gguf and --dry-run say nothing", "leave them out"
            )
    elif samples is not None or each_matrix:
        raise BitassayError(
            "--samples and --each-matrix are of --analyze",
            "--analyze too, or in the recipe: calibration: {samples: 128, tokens: 512}",
        )
    elif out is None and gguf is None:
        raise BitassayError("nowhere to write to", "--out FOLDER, --gguf FILE, or both")
    elif out is None and layout is not None:
        raise BitassayError("--layout is of the folder", "--out FOLDER too, or leave it out")
    check_words([model], [recipe], folder=out, file=gguf)
    if work is not None:
        check_folder(work)
    from bitassay.cli.analysis import run_analysis
    from bitassay.cli.progress import show_progress
    from bitassay.models.source import resolve
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.report.tables import Column, number, significant, size

    if analyze:
        return run_analysis(
            model,
            recipe,
            out,
            dtype,
            8 if samples is None else samples,
            each_matrix,
            loading,
            format,
        )
    sizes = (
        Column("recipe", "recipe", align="left"),
        Column("layout", "layout", align="left"),
        Column("bits_per_weight", "bits/weight", number(3)),
        Column("size_bytes", "size", size),
        Column("file_bytes", "files", size),
    )
    columns = (
        *sizes,
        Column("seconds", "seconds", number(1)),
        Column("max_logits_difference", "largest logits\ndifference", significant(3)),
    )
    found = find_recipe(recipe)
    with show_progress() as progress:
        name = loading.of(model)
        source = resolve(name, progress)
        order = _Order(name, source, found, out, gguf, layout, work, dtype, check, loading, progress)
        folder_row, gguf_row = _finished_folder(order), _finished_gguf(order)
        if (out is None or folder_row) and (gguf is None or gguf_row):
            rows = [folder_row, gguf_row]
        elif dry_run:
            rows, columns = _planned(order), (*sizes, Column("memory_bytes", "memory", size))
        else:
            rows = _written(order, folder_row, gguf_row)
    emit([row for row in rows if row is not None], columns, format)
    return 0


@dataclass(frozen=True)
class _Order:
    """What was asked for."""

    model: str
    source: "Source"
    recipe: "Recipe"
    out: Path | None
    gguf: Path | None
    layout: "Layout | None"
    work: Path | None
    dtype: str
    check: bool
    loading: Loading
    progress: "Progress"


Row = dict[str, Any] | None


def _written(order: _Order, folder_row: Row, gguf_row: Row) -> list[Row]:
    """The rows of what was finished before and of what is written now."""
    from bitassay.data.corpora import bundled_prompts
    from bitassay.engines.load import load
    from bitassay.models.identity import tokenizer
    from bitassay.quantization.export.save import check_space

    for row in _planned(order):
        if order.out is not None and folder_row is None and row is not None and row["layout"] != "gguf":
            check_space(order.out, row["file_bytes"])
    started = time.monotonic()
    base = load(order.model, dtype=order.dtype, progress=order.progress, **order.loading.options)
    quantized = _quantized(order, base, folder_row)
    tokens = tokenizer(base)(bundled_prompts()[0], return_tensors="pt").input_ids if order.check else None
    if order.out is not None and folder_row is None:
        folder_row = _save_folder(order, quantized, order.out, tokens, started)
    if order.gguf is not None and gguf_row is None:
        gguf_row = _save_gguf(order, quantized, order.gguf, tokens, started)
    return [folder_row, gguf_row]


def _quantized(order: _Order, base: "PreTrainedModel", folder_row: Row) -> "PreTrainedModel":
    """`base`, quantized now, or with what a finished folder holds."""
    from bitassay.engines.load import load
    from bitassay.quantization.pipeline import quantize, quantize_once
    from bitassay.quantization.runtime.model import quantization_of, with_tensors

    if order.out is None or folder_row is None:
        if order.work is None:
            return quantize_once(base, order.recipe, progress=order.progress)
        return quantize(base, order.recipe, work=order.work, progress=order.progress)
    done = quantization_of(
        load(order.out, dtype=base.dtype, progress=order.progress, **order.loading.options)
    )
    assert done is not None
    return with_tensors(base, done)


def _save_folder(order: _Order, quantized: "PreTrainedModel", out: Path, tokens: Any, started: float) -> Row:
    from bitassay.quantization.export.save import reload_difference, save

    card = save(quantized, out, layout=order.layout, progress=order.progress)
    row = _folder_row(card, out) | {"seconds": time.monotonic() - started}
    if tokens is not None:
        reader = "plain transformers" if card.layout == "compressed-tensors" else "bitassay.load"
        order.progress(f"loading {out} with {reader}")
        row["max_logits_difference"] = reload_difference(
            quantized, out, tokens, trust_remote_code=order.loading.trust_remote_code
        )
    return row


def _save_gguf(order: _Order, quantized: "PreTrainedModel", path: Path, tokens: Any, started: float) -> Row:
    from bitassay.quantization.export.gguf_file import reload_difference, write_gguf

    written = write_gguf(quantized, path, progress=order.progress)
    for how, count in sorted(written.stored_as.items()):
        order.progress(f"{path.name}: {how}: {count} matrices")
    for note in written.notes:
        order.progress(f"{path.name}: {note}")
    row = _gguf_row(order, path, written.bits_per_weight) | {"seconds": time.monotonic() - started}
    if tokens is not None:
        order.progress(f"loading {path} with plain transformers")
        row["max_logits_difference"] = reload_difference(quantized, path, tokens)
    return row


def _planned(order: _Order) -> list[Row]:
    """What is known before any weight is read; refuses what could not be saved. The files are the tensors and
    what else the model's folder holds; which blocks a GGUF file has depends on the codes."""
    from bitassay.models.options import as_dtype
    from bitassay.models.shapes import without_weights
    from bitassay.quantization.export.gguf_file import check_gguf
    from bitassay.quantization.export.plan import plan_export

    trust = order.loading.trust_remote_code
    empty = without_weights(order.source, dtype=as_dtype(order.dtype), trust_remote_code=trust)
    plan = plan_export(empty, order.recipe, order.layout)
    if order.out is not None and plan.layout_reason is not None:
        order.progress(
            f"{order.out}: {plan.layout_reason}; bitassay.load reads it, plain transformers does not"
        )
    files = [path for path in order.source.folder.iterdir() if path.is_file()]
    others = sum(path.stat().st_size for path in files if path.suffix != ".safetensors")
    row = {
        "recipe": order.recipe.name,
        "layout": plan.layout,
        "bits_per_weight": plan.bits_per_weight,
        "size_bytes": plan.size_bytes,
        "file_bytes": plan.tensor_bytes + others,
        "memory_bytes": plan.memory_bytes,
    }
    if order.gguf is None:
        return [row]
    check_gguf(empty, order.recipe)
    unknown = {"layout": "gguf", "bits_per_weight": None, "file_bytes": None}
    return [row if order.out is not None else None, row | unknown]


def _finished_folder(order: _Order) -> Row:
    """The row of a folder that this very command has written before; None where it is empty or absent."""
    from bitassay.errors import BitassayError
    from bitassay.models.identity import Identity
    from bitassay.quantization.export.card import read_card
    from bitassay.record.files import explain_os_error

    if (out := order.out) is None:
        return None
    try:
        if not out.exists() or not any(out.iterdir()):
            return None
    except OSError as error:
        raise explain_os_error(error, out) from error
    if (card := read_card(out)) is None:
        raise BitassayError(
            f"{out}: holds something else than a model that `bitassay quantize` wrote", "give another --out"
        )
    base = Identity(order.source, own_code=order.loading.trust_remote_code)
    same_base = card.base.weights_digest == base.weights_digest
    same_base = same_base and card.base.config_digest in (None, base.config_digest)
    if not same_base or (card.recipe_id, card.dtype) != (order.recipe.recipe_id, order.dtype):
        raise BitassayError(
            f"{out}: holds {card.base.name} quantized by {card.recipe_name} in {card.dtype}, "
            f"not {order.source.name} by {order.recipe.name} in {order.dtype}",
            "give another --out, or remove that folder",
        )
    if order.layout not in (None, card.layout):
        raise BitassayError(
            f"{out}: holds the {card.layout} layout, not {order.layout}",
            "give another --out, or remove that folder",
        )
    print(f"{out}: finished before; its files are unchanged", file=sys.stderr)
    return _folder_row(card, out)


def _finished_gguf(order: _Order) -> Row:
    """The row of a GGUF file of the same base model and recipe; None where there is no file."""
    from bitassay.errors import BitassayError
    from bitassay.models.identity import Identity
    from bitassay.quantization.export.gguf_file import written_before

    if (path := order.gguf) is None or not path.exists():
        return None
    if written_before(path) != (order.recipe.recipe_id, Identity(order.source).weights_digest):
        raise BitassayError(
            f"{path}: holds something else than {order.source.name} by {order.recipe.name}",
            "give another --gguf, or remove that file",
        )
    print(f"{path}: finished before", file=sys.stderr)
    return _gguf_row(order, path, None)


def _folder_row(card: "Card", folder: Path) -> dict[str, Any]:
    return {
        "recipe": card.recipe_name,
        "layout": card.layout,
        "bits_per_weight": card.bits_per_weight,
        "size_bytes": card.size_bytes,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "seconds": None,
        "max_logits_difference": None,
    }


def _gguf_row(order: _Order, path: Path, bits_per_weight: float | None) -> dict[str, Any]:
    return {
        "recipe": order.recipe.name,
        "layout": "gguf",
        "bits_per_weight": bits_per_weight,
        "size_bytes": path.stat().st_size,
        "file_bytes": path.stat().st_size,
        "seconds": None,
        "max_logits_difference": None,
    }

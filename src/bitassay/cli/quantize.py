"""`bitassay quantize`: a recipe and a model to a checkpoint folder that transformers loads."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bitassay.cli.output import Format, emit

if TYPE_CHECKING:
    from bitassay.models.checkpoint import Card
    from bitassay.models.source import Source
    from bitassay.quantize.export import Layout
    from bitassay.quantize.recipe import Recipe
    from bitassay.record.progress import Progress


def quantize(
    model: str,
    *,
    recipe: str,
    out: Path,
    layout: Literal["compressed-tensors", "bitassay"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    check: bool = True,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
    format: Format = "table",
) -> int:
    """Quantize MODEL by a recipe and save it as a folder.

    Wherever the compressed-tensors format is exact, plain transformers loads the folder, else bitassay alone.

    Run again on a finished folder, the same command checks its files and says that it is done.

    Args:
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id.
        recipe: A shipped recipe or a YAML file.
        out: The folder to write; it must not exist or be empty.
        layout: How codes are stored. Without it, compressed-tensors wherever that is exact.
        dtype: What is not quantized is stored in this dtype. In float32 the checkpoint loads exactly;
            in 16 bits it is smaller, and transformers rounds the scales once more.
        check: Load the folder, with plain transformers where it can, and compare its logits.
        dry_run: Estimate the files and the memory, and stop.
        trust_remote_code: Run code that comes with the model.
        format: What to print on stdout.
    """
    from bitassay.cli.progress import show_progress
    from bitassay.models.source import resolve
    from bitassay.quantize.export import check_space
    from bitassay.quantize.recipe import find_recipe
    from bitassay.report.tables import Column, number, significant, size

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
        source = resolve(model, progress)
        row = _finished(out, source, found, dtype, layout)
        if row is None:
            row = _planned(source, found, dtype, layout, trust_remote_code)
            if dry_run:
                columns = (*sizes, Column("memory_bytes", "memory", size))
            else:
                check_space(out, row["file_bytes"])
                row = _written(model, found, out, dtype, layout, check, trust_remote_code, progress)
    emit([row], columns, format)
    return 0


def _written(
    model: str,
    recipe: "Recipe",
    out: Path,
    dtype: str,
    layout: "Layout | None",
    check: bool,
    trust_remote_code: bool,
    progress: "Progress",
) -> dict[str, Any]:
    """The row of a folder that is written now."""
    from bitassay.data.corpora import bundled_prompts
    from bitassay.models.load import load, tokenizer
    from bitassay.quantize.export import reload_difference, save
    from bitassay.quantize.model import quantize

    started = time.monotonic()
    base = load(model, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
    quantized = quantize(base, recipe, progress=progress)
    card = save(quantized, out, layout=layout, progress=progress)
    row = _row(card, out) | {"seconds": time.monotonic() - started}
    if check:
        reader = "plain transformers" if card.layout == "compressed-tensors" else "bitassay.load"
        progress(f"loading {out} with {reader}")
        tokens = tokenizer(base)(bundled_prompts()[0], return_tensors="pt").input_ids
        row["max_logits_difference"] = reload_difference(
            quantized, out, tokens, trust_remote_code=trust_remote_code
        )
    return row


def _planned(
    source: "Source", recipe: "Recipe", dtype: str, layout: "Layout | None", trust_remote_code: bool
) -> dict[str, Any]:
    """What is known before any weight is read; refuses what could not be saved. The files are the tensors and
    what else the model's folder holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitassay.models.load import as_dtype
    from bitassay.quantize.export import plan_export

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, dtype=as_dtype(dtype), trust_remote_code=trust_remote_code
        )
    plan = plan_export(empty, recipe, layout)
    others = sum(
        path.stat().st_size
        for path in source.folder.iterdir()
        if path.is_file() and path.suffix != ".safetensors"
    )
    return {
        "recipe": recipe.name,
        "layout": plan.layout,
        "bits_per_weight": plan.bits_per_weight,
        "size_bytes": plan.size_bytes,
        "file_bytes": plan.tensor_bytes + others,
        "memory_bytes": plan.memory_bytes,
    }


def _finished(
    out: Path, source: "Source", recipe: "Recipe", dtype: str, layout: "Layout | None"
) -> dict[str, Any] | None:
    """The row of a folder that this very command has written before; None where it is empty or absent."""
    from bitassay.errors import BitassayError
    from bitassay.models.checkpoint import read_card
    from bitassay.models.load import Identity
    from bitassay.record.files import explain_os_error

    try:
        if not out.exists() or not any(out.iterdir()):
            return None
    except OSError as error:
        raise explain_os_error(error, out) from error
    if (card := read_card(out)) is None:
        raise BitassayError(
            f"{out}: holds something else than a model that `bitassay quantize` wrote", "give another --out"
        )
    same_base = card.base.weights_digest == Identity(source).weights_digest
    if not same_base or (card.recipe_id, card.dtype) != (recipe.recipe_id, dtype):
        raise BitassayError(
            f"{out}: holds {card.base.name} quantized by {card.recipe_name} in {card.dtype}, "
            f"not {source.name} by {recipe.name} in {dtype}",
            "give another --out, or remove that folder",
        )
    if layout not in (None, card.layout):
        raise BitassayError(
            f"{out}: holds the {card.layout} layout, not {layout}",
            "give another --out, or remove that folder",
        )
    print(f"{out}: finished before; its files are unchanged", file=sys.stderr)
    return _row(card, out)


def _row(card: "Card", folder: Path) -> dict[str, Any]:
    return {
        "recipe": card.recipe_name,
        "layout": card.layout,
        "bits_per_weight": card.bits_per_weight,
        "size_bytes": card.size_bytes,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "seconds": None,
        "max_logits_difference": None,
    }

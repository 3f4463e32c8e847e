"""Write a quantized model as a checkpoint folder, as a GGUF file, or as both: what `bitassay quantize` does
(`checkpoint_job.py` says what is wanted).

What an earlier run of the same job finished is checked and kept, so an interrupted job continues. Every file
is a row with its layout, bits and sizes: `planned` estimates the rows before any weight is read, `written`
returns them when everything is there.
"""

import time
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.identity import Identity
from bitassay.models.opened import is_opened
from bitassay.models.options import as_device
from bitassay.models.walk import matrices
from bitassay.quantization.codes import storage
from bitassay.quantization.export import gguf_file, gguf_reload, save
from bitassay.quantization.export.card import read_card
from bitassay.quantization.export.gguf_plan import base_memory, check_llama_cpp, plan_gguf
from bitassay.quantization.export.opened_memory import gguf_memory
from bitassay.quantization.export.plan import LOADED, OPENED, Plan, choose_way, plan_export
from bitassay.quantization.export.registry import LAYOUTS
from bitassay.quantization.pipeline import quantize, quantize_cached
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import (
    quantization_of,
    with_tensors,
)
from bitassay.quantization.solvers import tune
from bitassay.record.files import explain_os_error
from bitassay.record.progress import Progress, silent
from bitassay.studies.checkpoint_job import LLAMA_CPP, CheckpointJob, Row
from bitassay.studies.quantize_time import quantize_seconds

TRANSFORMERS = "plain transformers"
PACKED = ("integer", "ternary")  # kinds of codes that vLLM's format packs
VLLM = "0.32: on a CPU 4 bits alone; on CUDA 4 and 8, and the others by the package humming"
WORK_BYTES = {"tune": tune.work_bytes_a_weight}  # that parts of a recipe put into the work folder
REMEDIES = {
    "vllm": "integers with whole zero points or none, in groups that divide the rows: portable-4bit, w4",
    "transformers": "a recipe that the compressed-tensors format holds: portable-4bit, w4, w8",
}


def planned(job: CheckpointJob, progress: Progress = silent) -> list[Row]:
    """Return the rows of a finished job, or what is known before any weight is read, with `memory_bytes`, and
    `planned_seconds` by a short timing of this machine. Raises BitassayError for what could not be saved."""
    outputs = _finished(job, progress)
    if outputs and None not in outputs.values():
        return [row for row in outputs.values() if row]
    rows, device = _plan(job, progress), as_device(job.loading.get("device", "cpu"))
    duration = quantize_seconds(job.empty(), job.recipe, device)
    progress(f"time: {duration}")
    return [row | {"planned_seconds": duration.seconds} for row in rows]


def _finished(job: CheckpointJob, progress: Progress) -> dict[str, Row | None]:
    """Return a row for each output that is wanted, None for one that is not there. Raises BitassayError where
    something else is in its place."""
    outputs: dict[str, Row | None] = {}
    if job.folder is not None:
        outputs["folder"] = _finished_folder(job, job.folder)
    if job.gguf is not None:
        outputs["gguf"] = _finished_gguf(job, job.gguf)
    for name, row in outputs.items():
        if row is not None:
            progress(f"{getattr(job, name)}: finished before; its content is unchanged")
    return outputs


def _plan(job: CheckpointJob, progress: Progress) -> list[Row]:
    """Return what is known before any weight is read. The size of a folder is that of its tensors and of the
    model's other files; that of a GGUF file the most that its tensors take, without the vocabulary."""
    empty, plans_folder = job.empty(), job.folder is not None or job.gguf is None
    try:
        plan = plan_export(empty, job.recipe, job.wanted_layout)
    except save.LayoutError as error:
        if job.engine is None:
            raise
        raise BitassayError(
            f"{job.engine} would not load it: {error.problem}", REMEDIES[job.engine]
        ) from error
    if job.engine == "vllm" and (widths := vllm_widths(empty, job.recipe)):
        which = " and ".join(map(str, widths))
        progress(
            f"{job.shown_folder}: {which}-bit codes, for which some builds of vLLM have no kernels ({VLLM})"
        )
    if plans_folder and plan.layout_reason is not None:
        progress(f"{job.shown_folder}: {plan.layout_reason}; bitassay.load reads it, {TRANSFORMERS} does not")
    file_bytes = plan.tensor_bytes + _size(job.source.folder, without=".safetensors")
    row = job.row(plan.layout, plan.bits_per_weight, plan.size_bytes, file_bytes)
    row["way"], row["memory_bytes"] = _way(plan, empty, job)
    row["work_bytes"] = work_bytes(empty, job.recipe, row["way"])
    rows = [row] if plans_folder else []
    if job.gguf is not None:
        file = plan_gguf(empty, job.recipe, job.embeddings)
        if job.engine == LLAMA_CPP:
            check_llama_cpp(file)
        if file.bits_per_weight > gguf_file.MORE_BITS * plan.bits_per_weight:
            how = ", ".join(file.stored_as)
            more = gguf_file.more_bits(plan.bits_per_weight, file.bits_per_weight)
            progress(f"{job.gguf.name}: up to {more} ({how})")
        file_bytes = None if job.like else file.tensor_bytes  # the given file's
        said = {"bits_per_weight": file.bits_per_weight, "file_bytes": file_bytes}
        rows.append(row | {"layout": "gguf"} | said)
    return rows


def vllm_widths(empty: PreTrainedModel, recipe: Recipe) -> list[int]:
    """Return the bits of packed codes other than 4, for which vLLM has fewer kernels than its format says."""
    schemes = [scheme for name in matrices(empty) if (scheme := recipe.scheme_for(name)) is not None]
    packed = [FORMATS[scheme.format] for scheme in schemes]
    widths = {2 if fmt.kind == "ternary" else int(fmt.bits) for fmt in packed if fmt.kind in PACKED}
    return sorted(widths - {4})


def work_bytes(empty: PreTrainedModel, recipe: Recipe, way: str) -> int:
    """Return what the work folder takes at its most, where there is one: the codes of all layers and, where
    they are tuned, what tuning starts from, its last two states and, a layer at a time, what it learns."""
    if not recipe.is_calibrated and way == LOADED:
        return 0
    bits, weights = 0, 0
    for name, view in matrices(empty).items():
        if (scheme := recipe.scheme_for(name)) is not None:
            weights += view.numel()
            bits += storage.planned_bits(storage.planned(scheme), (view.shape[0], view.shape[1]))
    a_weight = sum(bytes_of(way == OPENED) for bytes_of, _ in recipe.steps(WORK_BYTES))
    return bits // 8 + a_weight * weights


def _way(plan: Plan, empty: PreTrainedModel, job: CheckpointJob) -> tuple[str, int]:
    """How the job is done in its memory, and the peak in bytes; else BitassayError."""
    ways, remedy = {LOADED: plan.memory_bytes}, ""
    if plan.opened_memory_bytes is None:
        remedy = ", or a recipe that goes a layer at a time, such as w4"
    else:
        writing = 0 if job.gguf is None else gguf_memory(empty)
        ways[OPENED] = max(plan.opened_memory_bytes, writing)
    return choose_way(ways, job.memory, f"{job.source.name} by {job.recipe.name}", remedy)


def written(job: CheckpointJob, progress: Progress = silent) -> list[Row]:
    """Write what is missing and return a row for each output. The rows of what is written now have seconds,
    and with `check` the largest difference of logits to the reloaded model."""
    started = time.monotonic()
    outputs = _finished(job, progress)
    if None in outputs.values():
        rows = _plan(job, progress)
        for row in rows:
            if job.folder is not None and outputs["folder"] is None and row["layout"] != "gguf":
                save.check_space(job.folder, row["file_bytes"])
        opened = rows[0]["way"] == OPENED
        base = load(job.model, progress=progress, opened=opened, **job.loading)
        quantized = _quantized(job, base, progress, is_finished=outputs.get("folder") is not None)
        tokens = job.tokens(base)
        for name, write in (("folder", _write_folder), ("gguf", _write_gguf)):
            if name in outputs and outputs[name] is None:
                row = write(job, quantized, tokens, progress)
                outputs[name] = row | {"seconds": time.monotonic() - started}
    return [row for row in outputs.values() if row]


def _quantized(
    job: CheckpointJob, base: PreTrainedModel, progress: Progress, is_finished: bool
) -> PreTrainedModel:
    """Quantize `base`, or give it the codes of the finished folder."""
    if is_finished:
        reloaded = load(job.folder or "", progress=progress, opened=is_opened(base), **job.loading)
        saved = quantization_of(reloaded)
        assert saved is not None
        return with_tensors(base, saved)
    if job.work is None:
        return quantize_cached(base, job.recipe, progress=progress)
    return quantize(base, job.recipe, work=job.work, progress=progress)


def _write_folder(
    job: CheckpointJob,
    quantized: PreTrainedModel,
    tokens: Int[Tensor, "batch tokens"] | None,
    progress: Progress,
) -> Row:
    assert job.folder is not None
    card = save.save(quantized, job.folder, layout=job.wanted_layout, progress=progress)
    if card.stored_bits_per_weight > gguf_file.MORE_BITS * card.bits_per_weight:
        stored, said = card.stored_bits_per_weight, card.bits_per_weight
        progress(f"{job.folder.name}: {stored:.2f} bits a weight in this folder, {said:.2f} in the recipe")
    row = job.row(card.layout, card.bits_per_weight, card.size_bytes, _size(job.folder))
    if tokens is not None:
        plain = LAYOUTS[card.layout].is_plain and not is_opened(quantized)
        progress(f"loading {job.folder} with {TRANSFORMERS if plain else 'bitassay.load'}")
        row["max_logits_difference"] = save.reload_difference(
            quantized, job.folder, tokens, trust_remote_code=job.trust_remote_code
        )
    return row


def _write_gguf(
    job: CheckpointJob,
    quantized: PreTrainedModel,
    tokens: Int[Tensor, "batch tokens"] | None,
    progress: Progress,
) -> Row:
    assert job.gguf is not None
    file = gguf_file.write_gguf(
        quantized, job.gguf, embeddings=job.embeddings, kinds=job.like, progress=progress
    )
    for blocks, count in sorted(file.stored_as.items()):
        progress(f"{job.gguf.name}: {blocks}: {count} matrices")
    for note in file.notes:
        progress(f"{job.gguf.name}: {note}")
    row = job.row("gguf", file.bits_per_weight, job.gguf.stat().st_size)
    if tokens is not None:
        progress(f"reading {job.gguf} back")
        row["max_logits_difference"] = gguf_reload.reload_difference(quantized, job.gguf, tokens)
    return row


def write_base(job: CheckpointJob, progress: Progress = silent) -> Row:
    """Write the model as it is as a GGUF file, and return its row; the recipe of `job` says nothing. Raises
    BitassayError for a file that is there already, and for what llama.cpp would run as another model."""
    assert job.gguf is not None
    started = time.monotonic()
    if job.gguf.exists():
        raise BitassayError(f"{job.gguf}: exists already", "choose another file or remove this one first")
    empty = job.empty()
    gguf_file.check_gguf(empty, None)
    way, _ = choose_way(base_memory(empty), job.memory, f"{job.source.name} as GGUF")
    base = load(job.model, progress=progress, opened=way == OPENED, **job.loading)
    row = _write_gguf(job, base, job.tokens(base), progress)
    return row | {"recipe": "base", "seconds": time.monotonic() - started}


def _finished_folder(job: CheckpointJob, folder: Path) -> Row | None:
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return None
    except OSError as error:
        raise explain_os_error(error, folder) from error
    if (card := read_card(folder)) is None:
        raise BitassayError(
            f"{folder}: holds something else than a model that `bitassay quantize` wrote",
            "give another --out",
        )
    base, dtype = Identity(job.source, own_code=job.trust_remote_code), job.loading["dtype"]
    is_base = card.base.weights_digest == base.weights_digest
    is_base = is_base and card.base.config_digest in (None, base.config_digest)
    there, wanted = f"the {card.layout} layout", f"{job.layout}"
    if not is_base or (card.recipe.recipe_id, card.dtype) != (job.recipe.recipe_id, dtype):
        there = f"{card.base.name} quantized by {card.recipe.name} in {card.dtype}"
        wanted = f"{job.source.name} by {job.recipe.name} in {dtype}"
    elif job.wanted_layout in (None, card.layout):
        return job.row(card.layout, card.bits_per_weight, card.size_bytes, _size(folder))
    raise BitassayError(f"{folder}: holds {there}, not {wanted}", "give another --out, or remove that folder")


def _finished_gguf(job: CheckpointJob, path: Path) -> Row | None:
    if not path.exists():
        return None
    embeddings = job.embeddings or (gguf_file.LIKE if job.like else "")
    wanted = job.recipe.recipe_id, Identity(job.source).weights_digest, embeddings
    if gguf_reload.written_before(path) != wanted:
        raise BitassayError(
            f"{path}: holds something else than {job.source.name} by {job.recipe.name}, "
            f"with embeddings {embeddings or 'in 16 bits'}",
            "give another --gguf, or remove that file",
        )
    return job.row("gguf", None, path.stat().st_size)


def _size(folder: Path, without: str | None = None) -> int:
    """Return the bytes of the files in `folder`, leaving out those with the suffix `without`."""
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != without]
    return sum(path.stat().st_size for path in files)

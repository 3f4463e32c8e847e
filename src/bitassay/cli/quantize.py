"""`bitassay quantize`: a recipe and a model to a checkpoint folder, a GGUF file, or both."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitassay.cli.checks import check_words
from bitassay.cli.options import Compute, Count, Flag, Model, Output, RecipeName, RunOutput, StateDtype, group
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError
from bitassay.record.files import check_folder, explain_os_error
from bitassay.report.tables import Column, number, significant, size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitassay.models.source import Source
    from bitassay.quantization.export.save import Layout
    from bitassay.quantization.recipe.recipe import Recipe
    from bitassay.record.progress import Progress

Row = dict[str, Any]

SIZES = (
    Column("recipe", "recipe", align="left"),
    Column("layout", "layout", align="left"),
    Column("bits_per_weight", "bits/weight", number(3)),
    Column("size_bytes", "size", size),
    Column("file_bytes", "files", size),
)
PLANNED_COLUMNS = (*SIZES, Column("memory_bytes", "memory", size))
WRITTEN_COLUMNS = (
    *SIZES,
    Column("seconds", "seconds", number(1)),
    Column("max_logits_difference", "largest logits\ndifference", significant(3)),
)


@group
class Storage(Compute):
    """How MODEL is loaded, and in which dtype it is stored."""

    dtype: StateDtype = "float32"
    """Dtype of everything that is not quantized. In float32 the checkpoint loads exactly; in 16 bits it is
    smaller, and transformers rounds the scales once more."""


def quantize(
    model: Model,
    *,
    recipe: RecipeName,
    out: Path | None = None,
    gguf: Path | None = None,
    layout: Literal["compressed-tensors", "bitassay"] | None = None,
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

    Plain transformers loads the folder where the compressed-tensors format is exact, otherwise only bitassay
    does. Run again, the same command checks what is finished and does the rest: a calibrated recipe continues
    after the last finished layer.

    Args:
        out: The folder to write. It must be new or empty.
        gguf: The file to write for llama.cpp. It must be new.
        layout: How the folder stores codes (default: compressed-tensors where that is exact, otherwise
            bitassay).
        work: Where a calibrated recipe keeps its finished layers and its result (default: in the cache, where
            other commands find the result too).
        check: Load the written files, with plain transformers where it can, and compare the logits.
        dry_run: Estimate the files and the memory, and stop.
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
    elif out is None and gguf is None:
        raise BitassayError("no place to write to is named", "--out FOLDER, --gguf FILE, or both")
    elif out is None and layout is not None:
        raise BitassayError("--layout belongs to the folder", "add --out FOLDER, or leave it out")
    check_words([model], [recipe], folder=out, file=gguf)
    if work is not None:
        check_folder(work)
    if analyze:
        return _analyze(model, recipe, samples or 8, each_matrix, storage, RunOutput(output.format, out))
    from bitassay.models.source import resolve
    from bitassay.quantization.recipe.recipe import find_recipe

    columns, wanted = WRITTEN_COLUMNS, find_recipe(recipe)
    with show_progress() as progress:
        source = resolve(storage.of(model), progress)
        job = _Job(
            storage.of(model),
            source,
            wanted,
            out,
            gguf,
            layout,
            work,
            check,
            storage,
            progress,
            time.monotonic(),
        )
        folder_row, gguf_row = job.finished_folder(), job.finished_gguf()
        if (out is None or folder_row) and (gguf is None or gguf_row):
            rows = [folder_row, gguf_row]
        elif dry_run:
            rows, columns = job.plan(), PLANNED_COLUMNS
        else:
            rows = job.write(folder_row, gguf_row)
    output.emit(([row for row in rows if row is not None], columns))
    return 0


@dataclass(frozen=True)
class _Job:
    """What was asked for, and the steps towards it. A row describes one file or folder; None stands for one
    that was not asked for or is not there yet."""

    model: str
    source: "Source"
    recipe: "Recipe"
    out: Path | None
    gguf: Path | None
    layout: "Layout | None"
    work: Path | None
    check: bool
    storage: Storage
    progress: "Progress"
    started: float

    def write(self, folder_row: Row | None, gguf_row: Row | None) -> list[Row | None]:
        """Write what is missing, and return its rows with those of an earlier run."""
        from bitassay.data.corpora import bundled_prompts
        from bitassay.engines.load import load
        from bitassay.models.identity import tokenizer
        from bitassay.quantization.export.save import check_space

        for row in self.plan():
            if self.out is not None and folder_row is None and row is not None and row["layout"] != "gguf":
                check_space(self.out, row["file_bytes"])
        base = load(self.model, progress=self.progress, **self.storage.options)
        quantized = self._quantized(base, is_finished=folder_row is not None)
        tokens = tokenizer(base)(bundled_prompts()[0], return_tensors="pt").input_ids if self.check else None
        if self.out is not None and folder_row is None:
            folder_row = self._write_folder(quantized, self.out, tokens)
        if self.gguf is not None and gguf_row is None:
            gguf_row = self._write_gguf(quantized, self.gguf, tokens)
        return [folder_row, gguf_row]

    def _quantized(self, base: "PreTrainedModel", is_finished: bool) -> "PreTrainedModel":
        """Quantize `base`, or take the codes of the finished folder."""
        from bitassay.engines.load import load
        from bitassay.quantization.pipeline import quantize, quantize_cached
        from bitassay.quantization.runtime.model import quantization_of, with_tensors

        if self.out is None or not is_finished:
            if self.work is None:
                return quantize_cached(base, self.recipe, progress=self.progress)
            return quantize(base, self.recipe, work=self.work, progress=self.progress)
        saved = quantization_of(load(self.out, progress=self.progress, **self.storage.options))
        assert saved is not None
        return with_tensors(base, saved)

    def _write_folder(self, quantized: "PreTrainedModel", out: Path, tokens: Any) -> Row:
        from bitassay.quantization.export.save import reload_difference, save

        card = save(quantized, out, layout=self.layout, progress=self.progress)
        row = self._row(card.layout, card.bits_per_weight, card.size_bytes, _files_size(out), now=True)
        if tokens is not None:
            reader = "plain transformers" if card.layout == "compressed-tensors" else "bitassay.load"
            self.progress(f"loading {out} with {reader}")
            row["max_logits_difference"] = reload_difference(
                quantized, out, tokens, trust_remote_code=self.storage.trust_remote_code
            )
        return row

    def _write_gguf(self, quantized: "PreTrainedModel", path: Path, tokens: Any) -> Row:
        from bitassay.quantization.export.gguf_file import reload_difference, write_gguf

        written = write_gguf(quantized, path, progress=self.progress)
        for blocks, count in sorted(written.stored_as.items()):
            self.progress(f"{path.name}: {blocks}: {count} matrices")
        for note in written.notes:
            self.progress(f"{path.name}: {note}")
        row = self._row("gguf", written.bits_per_weight, path.stat().st_size, now=True)
        if tokens is not None:
            self.progress(f"loading {path} with plain transformers")
            row["max_logits_difference"] = reload_difference(quantized, path, tokens)
        return row

    def plan(self) -> list[Row | None]:
        """Return what is known before any weight is read; refuse what could not be saved. The size of a
        folder is that of its tensors and of the model's other files; the blocks of a GGUF file depend on the
        codes."""
        from bitassay.models.options import as_dtype
        from bitassay.models.shapes import without_weights
        from bitassay.quantization.export.gguf_file import check_gguf
        from bitassay.quantization.export.plan import plan_export

        trust = self.storage.trust_remote_code
        empty = without_weights(self.source, dtype=as_dtype(self.storage.dtype), trust_remote_code=trust)
        plan = plan_export(empty, self.recipe, self.layout)
        if self.out is not None and plan.layout_reason is not None:
            self.progress(
                f"{self.out}: {plan.layout_reason}; bitassay.load reads it, plain transformers does not"
            )
        files = plan.tensor_bytes + _files_size(self.source.folder, without=".safetensors")
        row = self._row(plan.layout, plan.bits_per_weight, plan.size_bytes, files)
        row["memory_bytes"] = plan.memory_bytes
        if self.gguf is None:
            return [row]
        check_gguf(empty, self.recipe)
        unknown = {"layout": "gguf", "bits_per_weight": None, "file_bytes": None}
        return [row if self.out is not None else None, row | unknown]

    def finished_folder(self) -> Row | None:
        """Return the row of a folder that this command wrote before; None where it is empty or absent."""
        from bitassay.models.identity import Identity
        from bitassay.quantization.export.card import read_card

        if (out := self.out) is None:
            return None
        try:
            if not out.exists() or not any(out.iterdir()):
                return None
        except OSError as error:
            raise explain_os_error(error, out) from error
        if (card := read_card(out)) is None:
            raise BitassayError(
                f"{out}: holds something else than a model that `bitassay quantize` wrote",
                "give another --out",
            )
        base = Identity(self.source, own_code=self.storage.trust_remote_code)
        is_base = card.base.weights_digest == base.weights_digest
        is_base = is_base and card.base.config_digest in (None, base.config_digest)
        found, wanted = f"the {card.layout} layout", f"{self.layout}"
        if not is_base or (card.recipe_id, card.dtype) != (self.recipe.recipe_id, self.storage.dtype):
            found = f"{card.base.name} quantized by {card.recipe_name} in {card.dtype}"
            wanted = f"{self.source.name} by {self.recipe.name} in {self.storage.dtype}"
        elif self.layout in (None, card.layout):
            print(f"{out}: finished before; its files are unchanged", file=sys.stderr)
            return self._row(card.layout, card.bits_per_weight, card.size_bytes, _files_size(out))
        raise BitassayError(
            f"{out}: holds {found}, not {wanted}", "give another --out, or remove that folder"
        )

    def finished_gguf(self) -> Row | None:
        """Return the row of a GGUF file of the same base model and recipe; None where there is no file."""
        from bitassay.models.identity import Identity
        from bitassay.quantization.export.gguf_file import written_before

        if (path := self.gguf) is None or not path.exists():
            return None
        if written_before(path) != (self.recipe.recipe_id, Identity(self.source).weights_digest):
            raise BitassayError(
                f"{path}: holds something else than {self.source.name} by {self.recipe.name}",
                "give another --gguf, or remove that file",
            )
        print(f"{path}: finished before", file=sys.stderr)
        return self._row("gguf", None, path.stat().st_size)

    def _row(
        self,
        layout: str,
        bits_per_weight: float | None,
        size_bytes: int,
        file_bytes: int | None = None,
        now=False,
    ) -> Row:
        return {
            "recipe": self.recipe.name,
            "layout": layout,
            "bits_per_weight": bits_per_weight,
            "size_bytes": size_bytes,
            "file_bytes": size_bytes if file_bytes is None else file_bytes,
            "seconds": time.monotonic() - self.started if now else None,
            "max_logits_difference": None,
        }


def _files_size(folder: Path, without: str | None = None) -> int:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != without]
    return sum(path.stat().st_size for path in files)


def _analyze(
    model: str, recipe: str, samples: int, each_matrix: bool, storage: Storage, output: RunOutput
) -> int:
    """Analyze, write run.json, report.html and heat-map.png into the run folder, and print the layers."""
    from bitassay.quantization.analysis import AnalysisPlan, analyze
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.calibration import Calibration
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.report import analysis as report

    analyzed = find_recipe(recipe)
    text = (analyzed.calibration or Calibration()).model_copy(update={"samples": samples})
    with show_progress() as progress:
        trust = storage.trust_remote_code
        check_fit(storage.of(model), [analyzed], trust_remote_code=trust, progress=progress)
        base = storage.load(model, progress=progress)
        plan = AnalysisPlan(text, each_matrix)
        run, folder = analyze(base, analyzed, plan, out=output.out, progress=progress)
    report.write_heat_map(run, folder / "heat-map.png")
    worst = (report.worst_matrices(run, 10), report.MATRIX_COLUMNS[:7])
    output.show_run(
        run,
        folder,
        (run["layers"], report.LAYER_COLUMNS),
        (run["routing"], report.ROUTING_COLUMNS),
        worst,
        csv=(run["matrices"], report.MATRIX_COLUMNS),
    )
    return 0

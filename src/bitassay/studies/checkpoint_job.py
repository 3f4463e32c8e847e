"""What `bitassay quantize` is asked to write, and where. `checkpoint.py` writes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.data.corpora import bundled_prompts
from bitassay.errors import BitassayError
from bitassay.models.empty import without_weights
from bitassay.models.identity import tokenizer
from bitassay.models.options import as_dtype
from bitassay.models.source import Source
from bitassay.quantization.export import gguf_file, gguf_like
from bitassay.quantization.export.registry import GROUPED, STANDARD
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import fitted_to
from bitassay.record.progress import Progress, silent

Row = dict[str, Any]
LLAMA_CPP = "llama.cpp"
# What `--for` takes, and the layout of the folder that such an engine loads.
ENGINES: dict[str, str | None] = {"vllm": GROUPED, "transformers": STANDARD, LLAMA_CPP: None}


@dataclass(frozen=True)
class CheckpointJob:
    """What to write and where. model, source: its name, and the files behind it. folder, gguf: the outputs,
    None for one that is not wanted; without both, `planned` plans a folder. layout: of the folder (None:
    compressed-tensors where that is exact). work: where a calibrated recipe keeps its finished layers (None:
    in the cache). check: load what was written and compare logits. memory: bytes to work in (None: what is
    free). loading: keywords of `load`. embeddings: the type of the embedding and the head in a GGUF file
    (None: 16 bits). engine: a name in ENGINES that must be able to load what is written, or None. like: the
    type of every tensor of the GGUF file, by its name there, or None."""

    model: str
    source: Source
    recipe: Recipe
    folder: Path | None
    gguf: Path | None
    layout: str | None = None
    work: Path | None = None
    check: bool = True
    memory: int | None = None
    loading: Mapping[str, Any] = field(default_factory=lambda: {"dtype": "float32"})
    embeddings: str | None = None
    engine: str | None = None
    like: Mapping[str, Any] | None = None

    @property
    def wanted_layout(self) -> str | None:
        """Return the layout that was asked for, by name or by engine; None where any will do."""
        return self.layout or ENGINES.get(self.engine or "")

    @property
    def shown_folder(self) -> str:
        """Return the name of the folder, which a plan may be without."""
        return "the folder" if self.folder is None else str(self.folder)

    @property
    def trust_remote_code(self) -> bool:
        """Return whether code that comes with the model may run."""
        return self.loading.get("trust_remote_code", False)

    def empty(self) -> PreTrainedModel:
        """Return the model without weights, on the meta device."""
        dtype = as_dtype(self.loading["dtype"])
        return without_weights(self.source, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def tokens(self, model: PreTrainedModel) -> Int[Tensor, "batch tokens"] | None:
        """Return the text on which logits are compared; None where they are not."""
        return tokenizer(model)(bundled_prompts()[0], return_tensors="pt").input_ids if self.check else None

    def row(
        self, layout: str, bits_per_weight: float | None, size_bytes: int, file_bytes: int | None = None
    ) -> Row:
        return {
            "recipe": self.recipe.name,
            "layout": layout,
            "bits_per_weight": bits_per_weight,
            "size_bytes": size_bytes,
            "file_bytes": size_bytes if file_bytes is None else file_bytes,
            "seconds": None,
            "max_logits_difference": None,
        }


def fitted(job: CheckpointJob, progress: Progress = silent) -> CheckpointJob:
    """Return the job with formats that the rows of the model's matrices can have, and say what changed."""
    recipe, said = fitted_to(job.empty(), job.recipe)
    for line in said:
        progress(line)
    return replace(job, recipe=recipe)


def like_file(job: CheckpointJob, path: Path) -> CheckpointJob:
    """Return the job with the types of a given GGUF file in place of the recipe's grids. Raises
    BitassayError for a file of another model, or of types that have no grid here."""
    types, empty = gguf_like.types_of(path), job.empty()
    gguf_file.check_gguf(empty, None)
    try:
        recipe = gguf_like.recipe_like(job.recipe, types, empty)
    except BitassayError as error:
        raise BitassayError(f"{path}: {error.problem}", error.remedy) from error
    kinds = {name: kind for name, (kind, _) in types.items()}
    return replace(job, recipe=recipe, like=kinds, embeddings=None)

"""The types of a given GGUF file, for a file of the same bytes with codes of our own: `quantize --like`.

Each matrix gets the grid of its type there, on which a recipe's solvers work. IQ1, IQ2 and IQ3 types, whose
codes are entries of fixed tables of several weights, have no grid here; a file with such matrices is refused,
by the names of the types.
"""

from collections import Counter
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.gguf_model import sources_of
from bitassay.models.gguf_rope import ROPE_TENSORS
from bitassay.models.walk import matrices
from bitassay.quantization.export.gguf_description import ARCHITECTURES
from bitassay.quantization.export.gguf_round import PLAIN, TYPES
from bitassay.quantization.export.gguf_schemes import SCHEMES
from bitassay.quantization.recipe.recipe import Override, Recipe

Types = dict[str, tuple[Kind, tuple[int, ...]]]


def types_of(path: Path) -> Types:
    """Return the type and the shape `[out, in]` of each tensor of a file, by its name there. Raises
    BitassayError for what is no GGUF file."""
    try:
        tensors = GGUFReader(path).tensors
        return {t.name: (t.tensor_type, tuple(int(size) for size in reversed(t.shape))) for t in tensors}
    except Exception as error:  # gguf raises whatever the defect happens to trip over
        why = f"cannot be read as GGUF ({type(error).__name__}: {error})"
        raise BitassayError(f"{path}: {why}", "check the path, or download the file again") from error


def recipe_like(recipe: Recipe, types: Types, model: PreTrainedModel) -> Recipe:
    """Return `recipe` with the grids of a file's types in place of its own; the model may be on the meta
    device. Raises BitassayError for types without a grid, and for a file of another model."""
    if recipe.mixed is not None or recipe.replication is not None:
        raise BitassayError(
            f"{recipe.name}: its mixed bits or replication choose other matrices than the file has",
            "another recipe, such as gguf-q4_0",
        )
    config = model.config.get_text_config()
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]

    def named(name: str) -> str:
        return sources_of(name, architecture, config.num_hidden_layers)[0]

    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {named(key): tuple(v.shape) for key, v in model.state_dict().items() if key not in tied}
    shapes.pop("rope_freqs.weight", None)
    there = {name: shape for name, (_, shape) in types.items() if name not in ROPE_TENSORS}
    if there != shapes:
        other = sorted(name for name in {*there, *shapes} if there.get(name) != shapes.get(name))
        said = f"{other[0]} is {there.get(other[0])} there, {shapes.get(other[0])} here"
        raise BitassayError(f"the file is of another model: {said}", "a file of this model")
    kinds = {name: types[named(f"{name}.weight")][0] for name in matrices(model)}
    unknown = Counter(kind.name for kind in kinds.values() if kind.name not in PLAIN and kind not in SCHEMES)
    if unknown:
        found = ", ".join(f"{name} ({count} matrices)" for name, count in unknown.most_common())
        raise BitassayError(
            f"no grid here for {found}", f"a file of {', '.join(kind.name for kind in SCHEMES)}"
        )
    others = {kind.name for kind, shape in types.values() if len(shape) > 1} - {kind.name for kind in SCHEMES}
    if beside := sorted(others - {*TYPES}):
        raise BitassayError(
            f"the embedding or the head is in {beside[0]}, to which nothing is rounded here",
            f"a file with {', '.join(TYPES)} there",
        )
    schemes = {name: SCHEMES.get(kind) for name, kind in kinds.items()}
    commonest = Counter(scheme for scheme in schemes.values() if scheme is not None).most_common(1)
    if not commonest:
        raise BitassayError("the file has no quantized matrix", "a quantized file")
    usual = commonest[0][0]
    overrides = [Override(match=name, weights=s) for name, s in schemes.items() if s != usual]
    return recipe.model_copy(
        update={"name": f"{recipe.name[:56]}-like", "weights": usual, "overrides": tuple(overrides)}
    )

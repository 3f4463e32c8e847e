"""Reading back a GGUF file that `gguf_file.py` wrote: what it says of itself, and whether it is the model."""

from pathlib import Path

import torch
from gguf import GGUFReader
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.models.gguf_model import open_gguf, read_model
from bitassay.models.opened import is_opened, open_plain, weights_of
from bitassay.models.options import LoadOptions, attention_of
from bitassay.models.walk import module_name
from bitassay.quantization.export.gguf_file import BASE_KEY, EMBEDDINGS_KEY, RECIPE_KEY


def written_before(path: Path) -> tuple[str, str, str] | None:
    """Return the recipe's id, the base model's weights digest and the type of the embeddings of a GGUF file
    of ours; None for another."""
    try:
        fields = GGUFReader(path).fields
        said = fields.get(EMBEDDINGS_KEY)
        embeddings = "" if said is None else str(said.contents())
        return str(fields[RECIPE_KEY].contents()), str(fields[BASE_KEY].contents()), embeddings
    except (KeyError, ValueError, IndexError, OverflowError, OSError):
        return None


def reload_difference(model: PreTrainedModel, path: str | Path, tokens: Int[Tensor, "batch tokens"]) -> float:
    """Return the largest difference between the logits of `model` and of the file, in the model's dtype. The
    file is read a layer at a time where the model is."""
    if is_opened(model):
        reloaded = _opened(Path(path), model)
    else:
        reloaded = read_model(GGUFReader(path), model.dtype)
        torch.nn.Module.to(reloaded, device=model.device)
    with torch.inference_mode():
        return (model(tokens).logits.float() - reloaded(tokens).logits.float()).abs().max().item()


def _opened(path: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model of a file, of which each weight is read when it is needed."""
    file = open_gguf(GGUFReader(path))
    reads, empty = dict(file.weights), file.empty
    if (head := empty.get_output_embeddings()) is not None:  # its weight may be the embedding's
        embedding = f"{module_name(empty, empty.get_input_embeddings())}.weight"
        reads.setdefault(f"{module_name(empty, head)}.weight", reads[embedding])
    options = LoadOptions(model.dtype, model.device, attention_of(model))
    made = [f"{name}.value" for name in reads]
    opened = open_plain(path.parent, empty.config, options, entries={}, made=made)
    weights = weights_of(opened)
    assert weights is not None
    for name, read in reads.items():
        weights.changes[name] = lambda _, read=read: read().to(model.device, model.dtype)
    return opened

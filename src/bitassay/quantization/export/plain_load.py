"""What plain transformers can load of a compressed-tensors folder, known without any weights.

Names. Checkpoints name some modules otherwise than the model that transformers builds, whose own table
(`conversion_mapping.py` there) says how: `block_sparse_moe` becomes `mlp`. A folder has the checkpoint's
names, which engines look for.

Experts. A checkpoint has a matrix for each expert and projection; transformers decodes these while it loads
them and puts them into one tensor (`integrations/compressed_tensors.py` there). A slice of ours is therefore
stored as the one or two matrices that its rows come from:

    <module>.experts.gate_up_proj.3  ->  <module>.experts.3.gate_proj, <module>.experts.3.up_proj

That way knows one scheme for all experts, no zero points, and scales of rows or of groups that divide them.
It decodes in the dtype of the scales, which are therefore stored in fp32.

Everything else is decoded in place, for which modules lose their `weight` while transformers prepares them;
classes that look for it then cannot be loaded, and are found by trying that on an empty model.
"""

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
)

from bitassay.models.transposed import as_linears, stores_transposed
from bitassay.models.walk import matrices, walk
from bitassay.quantization.codes.storage import Stored, description
from bitassay.quantization.codes.tensor import QuantizedTensor, from_codes
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.quantization.recipe.weights import WeightScheme

EXPERTS = r"re:.*\.experts\.\d+\..*"  # a target that names all experts, as transformers and vLLM look for it


class Piece(NamedTuple):
    """A matrix of a checkpoint: which of how many equal parts of a slice's rows, and its module's name."""

    name: str
    place: int
    of: int

    def rows(self, total: int) -> slice:
        size = total // self.of
        return slice(self.place * size, (self.place + 1) * size)


def expert_pieces(model: PreTrainedModel) -> dict[str, list[Piece]]:
    """Return the pieces that slices of fused experts are stored as, where checkpoints have single experts."""
    model = without_weights(model)
    merges = [way for way in _conversions(model) if isinstance(way, WeightConverter) and _merges_experts(way)]
    pieces: dict[str, list[Piece]] = {}
    for (name, parameter), way in itertools.product(walk(model).experts.items(), merges):
        patterns = (*way._original_target_patterns, *way._original_source_patterns)
        target, *sources = (pattern.replace("\\", "") for pattern in patterns)
        if model.get_submodule(name.rpartition(".")[0]).is_transposed or not f".{name}".endswith(target):
            continue
        for expert in range(len(parameter)):
            ends = [source.replace("*", str(expert)).removesuffix(".weight") for source in sources]
            names = [name.removesuffix(target) + end for end in ends]
            pieces[f"{name}.{expert}"] = [Piece(part, n, len(names)) for n, part in enumerate(names)]
    return pieces


def exact_scales(stored: Stored) -> Stored:
    """Return how a slice of experts is stored: with scales in fp32."""
    scheme = stored.scheme.model_copy(update={"scale_dtype": "float32"})
    return stored.model_copy(update={"scheme": scheme})


def part_of(tensor: QuantizedTensor, piece: Piece) -> QuantizedTensor:
    """Cut out the rows of a matrix that are one piece, with scales in fp32; it has no `obstacle`."""
    rows, scheme = piece.rows(tensor.shape[0]), exact_scales(description(tensor)).scheme
    return from_codes(tensor.codes()[rows], tensor.scale.float()[rows], scheme)


def joined(parts: list[QuantizedTensor], scheme: WeightScheme) -> QuantizedTensor:
    """Invert `part_of`: join all pieces of a matrix of `scheme`."""
    scales = torch.cat([part.scale.float() for part in parts])
    return from_codes(torch.cat([part.codes() for part in parts]), scales, scheme)


def keeps_names(model: PreTrainedModel) -> bool:
    """Return whether a folder can have the checkpoint's own names: not where these say that tensors beside
    the codes are cut or joined, which transformers tries on codes too."""
    ways = [way for way in _conversions(model) if isinstance(way, WeightConverter)]
    return all(_merges_experts(way) for way in ways)


def module_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Return what the model calls the tensors of a checkpoint, by their names there."""
    renamings = [way for way in _conversions(model) if isinstance(way, WeightRenaming)]
    modules = dict(model.named_modules())
    return {
        key: key if key.rpartition(".")[0] in modules else apply_renamings(key, renamings) for key in keys
    }


def obstacle(model: PreTrainedModel, described: Mapping[str, Stored]) -> str | None:
    """Return why plain transformers would not load such matrices of `model`; None where it does."""
    empty = without_weights(model)
    linears, experts = walk(empty).linears, walk(empty).experts
    quantized = [name for name in described if name in linears]
    if name := next((name for name in quantized if stores_transposed(linears[name])), None):
        return f"{name}: its class keeps weights as [in, out], which nothing decodes"
    slices = {name: stored for name, stored in described.items() if name.rpartition(".")[0] in experts}
    if slices and (why := _expert_obstacle(empty, slices)):
        return why
    return _preparing_obstacle(empty, quantized)


def _expert_obstacle(model: PreTrainedModel, slices: Mapping[str, Stored]) -> str | None:
    pieces, (name, stored) = expert_pieces(model), next(iter(slices.items()))
    if missing := next((name for name in slices if name not in pieces), None):
        return f"{missing}: transformers reads such experts from one tensor, and decodes no codes there"
    if left := next((name for name in pieces if name not in slices), None):
        return f"experts in part: it would lose {left}, which is left as it is"
    if other := next((name for name, how in slices.items() if how != stored), None):
        return f"{other} otherwise than {name}: transformers decodes all experts by one scheme"
    scheme, granularity = stored.scheme, Granularity.parse(stored.scheme.granularity)
    if not scheme.symmetric:
        return f"{name} with zero points: transformers decodes experts without"
    if granularity.name == "tensor":
        return f"{name}: transformers decodes no experts that have one scale each"
    size, columns = granularity.group_size, matrices(model)[name].shape[1]
    if size is not None and (FORMATS[scheme.format].kind == "float" or columns % size):
        return f"{name}: transformers decodes experts by rows, or of integers by groups that divide these"
    return None


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as it was before it was quantized, on the meta device."""
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config))
    as_linears(empty)
    return empty


def _preparing_obstacle(empty: PreTrainedModel, names: list[str]) -> str | None:
    """transformers replaces weights by codes before it initializes and ties others. Uses `empty` up."""
    for name in names:
        linear = empty.get_submodule(name)
        del linear.weight
        linear.register_parameter("weight_packed", nn.Parameter(torch.empty(0), requires_grad=False))
    try:
        for module in empty.modules():
            vars(module).pop("_is_hf_initialized", None)
        empty.initialize_weights()
        for pair in empty.all_tied_weights_keys.items():
            for key in pair:
                empty.get_parameter(key)
    except AttributeError as error:
        return f"codes: transformers looks for weights that are not there ({error})"
    return None


def _conversions(model: PreTrainedModel) -> list[WeightConverter | WeightRenaming]:
    return get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[return-value]


def _merges_experts(way: WeightConverter) -> bool:
    """Whether it stacks experts along the first dimension, and joins rows at most."""
    merge, *rest = way.operations
    return (
        isinstance(merge, MergeModulelist)
        and merge.dim == 0
        and all(isinstance(op, Concatenate) and op.dim == 1 for op in rest)
        and len(way._original_target_patterns) == 1
        and all(source.endswith(".weight") for source in way._original_source_patterns)
    )

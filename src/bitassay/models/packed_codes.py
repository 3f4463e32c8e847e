"""What compressed-tensors folders of other tools hold that transformers does not load.

Zero points of groups and channels are packed down the rows of a matrix, b bits each. transformers makes room
for unpacked ones, and reports that those in the files have another shape; the library then decodes packed
ones. So they are read here, and checked, between the two.

Groups in the order of activations (`actorder: group`, from llm-compressor and GPTQModel): column j belongs to
group `weight_g_idx[j]`. The library has dropped them, and refuses the configuration. Here the columns are
sorted by their groups, decoded, and put back. An index with -1 says nothing: the groups are in order.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from bitassay.errors import BitassayError
from bitassay.models.weights import AGAIN, Entry, check_files

ZERO_POINT, ORDER = "weight_zero_point", "weight_g_idx"


def without_order(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a quantization_config whose groups are not in the order of activations, which the library
    refuses to read; the order itself lies in the files."""
    settings = copy.deepcopy(settings)
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("actorder") in ("group", True):
            weights["actorder"] = None
    return settings


def read_packed(model: PreTrainedModel, report: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Give the linears of a compressed-tensors model their packed zero points, and take them out of `report`,
    which is what `from_pretrained` returns as loading info. Return the order of the columns of each linear
    that has one. Raises BitassayError for a tensor of another shape than the matrix needs."""
    entries = _by_module(model, check_files(folder))
    orders = dict[str, torch.Tensor]()
    for name, module in model.named_modules():
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if weights is None or not isinstance(module, nn.Linear):
            continue
        rows, columns = module.out_features, module.in_features
        entry = entries.get(f"{name}.{ZERO_POINT}")
        packed = not weights.symmetric and weights.strategy in ("group", "channel")
        if packed and entry is not None and hasattr(module, "weight_packed"):
            scale: Any = module.weight_scale
            _check(entry, torch.int32, (math.ceil(rows * weights.num_bits / 32), scale.shape[1]))
            module.register_parameter(ZERO_POINT, nn.Parameter(entry.read(), requires_grad=False))
            keys = report.get("mismatched_keys") or set()
            report["mismatched_keys"] = {key for key in keys if key[0] != f"{name}.{ZERO_POINT}"}
        order = entries.get(f"{name}.{ORDER}")
        if order is not None and hasattr(module, "weight_packed"):
            _check(order, torch.int32, (columns,))
            groups = order.read().long()
            if (groups >= 0).all():
                orders[name] = _order(groups, weights.group_size or columns, order)
            keys = report.get("unexpected_keys") or set()
            report["unexpected_keys"] = {key for key in keys if key != f"{name}.{ORDER}"}
    return orders


def decode(module: nn.Module, order: torch.Tensor | None, *, leave_decompressed: bool) -> None:
    """Decode a module in place as the library does; `order` sorts its columns by their groups."""
    if order is None:
        decompress_module(module, leave_decompressed=leave_decompressed)
        return
    holder: Any = module
    bits, shape = holder.quantization_scheme.weights.num_bits, torch.Size(holder.weight_shape.tolist())
    codes = unpack_from_int32(holder.weight_packed, bits, shape)
    packed = pack_to_int32(codes[:, order].contiguous(), bits)
    holder.register_parameter("weight_packed", nn.Parameter(packed, requires_grad=False))
    decompress_module(module, leave_decompressed=leave_decompressed)
    weight = holder.weight.data
    holder.weight.data = torch.empty_like(weight).index_copy_(1, order, weight)


def _order(groups: torch.Tensor, size: int, entry: Entry) -> torch.Tensor:
    """Return the columns sorted by their groups, each of `size` columns; the last may be shorter."""
    count = math.ceil(len(groups) / size)
    sizes = torch.bincount(groups, minlength=count).tolist()
    if sizes != [min(size, len(groups) - start) for start in range(0, len(groups), size)]:
        raise BitassayError(
            f"{entry.file}: {entry.key} does not put {len(groups)} columns into {count} groups of {size}",
            AGAIN,
        )
    return groups.argsort(stable=True)


def _check(entry: Entry, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise BitassayError(
            f"{entry.file}: {entry.key} is {entry.dtype} {list(entry.shape)}, "
            f"the model needs {dtype} {list(shape)}",
            AGAIN,
        )


def _by_module(model: PreTrainedModel, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return the tensors beside codes by the names that the model has for them."""
    ways: Any = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [way for way in ways if isinstance(way, WeightRenaming)]
    modules = dict(model.named_modules())
    return {
        key if key.rpartition(".")[0] in modules else apply_renamings(key, renamings): entry
        for key, entry in entries.items()
        if key.endswith((ZERO_POINT, ORDER))
    }

"""Save a quantized model as a compressed-tensors folder, which `AutoModelForCausalLM.from_pretrained` loads.

A weight is stored as codes and as what the library calls a strategy: which block of the matrix shares a
scale. It decodes `(q - z) * s` in the dtype it was loaded in, so in fp32 the weights are ours to the bit; in
16 bits the scales are rounded to the model's dtype first.

    codes       integers  `pack-quantized`: b bits a code in 32-bit words, each row padded to a whole word;
                          shifted to -2^(b-1) ... 2^(b-1)-1
                ternary   the same with b = 2, codes -1, 0, 1
                fp8_e4m3  `float-quantized`: torch.float8_e4m3fn
    granularity tensor -> `tensor`, channel -> `channel`, groups that divide the row -> `group`;
                with zero points, or a shorter last group -> `block` of one row and that many columns

The detour over `block` is there because transformers cannot load packed zero points of `group` and `channel`:
compressed-tensors 0.20 expects them unpacked when it prepares the model and packed when it decodes. Blocks
keep them as int8, one byte a group, and decode the same.

What the format cannot say is refused: e5m2 (the library's 8-bit float is e4m3), and binary (it would take two
bits).
"""

import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitassay.errors import BitassayError, MissingError
from bitassay.models.checkpoint import CARD_FILE, Base, Card, hashed_files
from bitassay.models.load import identity
from bitassay.models.walk import walk
from bitassay.quantize.formats import FORMATS
from bitassay.quantize.granularity import Granularity
from bitassay.quantize.model import Quantization, bits_per_weight, check_recipe, parameter_count, size_bytes
from bitassay.quantize.packing import PACKINGS
from bitassay.quantize.recipe import Recipe, WeightScheme
from bitassay.quantize.tensor import QuantizedTensor
from bitassay.record.files import atomic_folder, write_json
from bitassay.record.hashing import digest_file
from bitassay.record.progress import Progress, silent

PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
MARGIN_BYTES = 2**24  # configuration, tokenizer and file headers


def save(model: PreTrainedModel, folder: str | Path, *, progress: Progress = silent) -> Card:
    """Write a model that `quantize` made, fake or packed, into `folder`, which must not exist or be empty.

    Everything that the recipe left alone is stored in the model's dtype; tokenizer and generation settings go
    along, and `bitassay.json` says what the folder is. Raises BitassayError where the format cannot express a
    scheme exactly, MissingError where the disk is too small.
    """
    folder, quantization, base = Path(folder), _quantization(model), identity(model)
    dtype, dtypes = str(model.dtype).removeprefix("torch."), get_args(Card.model_fields["dtype"].annotation)
    if dtype not in dtypes:
        raise BitassayError(f"a checkpoint holds {', '.join(dtypes)}, not {dtype}", f"load it in {dtypes[0]}")
    configuration = quantization_config(model, quantization)
    progress(f"packing {len(quantization.tensors)} matrices")
    state = _state(model, quantization)
    check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    stored_bits_per_weight = _stored_bits(state, quantization)
    progress(f"writing {folder}")
    with atomic_folder(folder) as temporary:
        # transformers decodes the experts of a compressed checkpoint that come one by one, even dense ones,
        # and loses them; fused, they load as they are.
        model.save_pretrained(temporary, state_dict=state, save_original_format=not walk(model).experts)
        ModelCompressor(quantization_config=configuration).update_config(str(temporary))
        if getattr(model, "tokenizer", None) is not None:
            model.tokenizer.save_pretrained(temporary)  # type: ignore[union-attr]
        card = Card(
            schema_version=1,
            recipe=quantization.recipe.model_dump(mode="json"),
            base=Base(
                name=base.name,
                origin=base.source.origin,
                weights_digest=base.weights_digest,
                tokenizer_digest=base.tokenizer_digest,
            ),
            dtype=dtype,  # type: ignore[arg-type]
            bits_per_weight=bits_per_weight(model),
            stored_bits_per_weight=stored_bits_per_weight,
            size_bytes=size_bytes(model),
            versions={
                name: version(name) for name in ("bitassay", "compressed-tensors", "transformers", "torch")
            },
            files={path.name: digest_file(path) for path in hashed_files(temporary)},
        )
        for path in hashed_files(temporary):
            path.chmod((temporary / "config.json").stat().st_mode)  # safetensors makes private files
        write_json(temporary / CARD_FILE, card.model_dump(mode="json"))
    return card


@dataclass(frozen=True)
class Plan:
    """What quantizing by a recipe will give, known from shapes alone.

    size_bytes: as `quantize.model.size_bytes` counts. tensor_bytes: what the folder's tensors take.
    memory_bytes: the base model, the quantized one, its codes twice (as kept and as stored), and the reloaded
    model beside them.
    """

    matrices: int
    bits_per_weight: float
    size_bytes: int
    tensor_bytes: int
    memory_bytes: int


def plan_export(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Check that `recipe` fits `model` (which may be on the meta device) and that every matrix can be saved.
    Raises BitassayError where not.
    """
    bits = weights = matrices = stored = 0
    for name, linear in check_recipe(model, recipe).items():
        if scheme := recipe.scheme_for(name):
            shape = (linear.out_features, linear.in_features)
            bits += planned_bits(scheme, shape)
            stored += planned_bytes(scheme, shape, name)
            weights += shape[0] * shape[1]
            matrices += 1
    if not matrices:
        raise BitassayError(
            f"recipe {recipe.name} quantizes nothing in {type(model).__name__}",
            "another recipe; see `bitassay recipes list`",
        )
    parameters, item = parameter_count(model), model.dtype.itemsize
    return Plan(
        matrices=matrices,
        bits_per_weight=bits / weights,
        size_bytes=(parameters - weights) * 2 + bits // 8,
        tensor_bytes=(parameters - weights) * item + stored,
        memory_bytes=(2 * parameters + weights) * item + bits // 8 + 2 * stored,
    )


def reload_difference(
    model: PreTrainedModel, folder: str | Path, tokens: Int[Tensor, "batch tokens"]
) -> float:
    """The largest difference between the logits of `model` and of the folder as plain transformers loads it,
    in the model's dtype.
    """
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, device_map=model.device).eval()
    with torch.inference_mode():
        return (model(tokens).logits.float() - reloaded(tokens).logits.float()).abs().max().item()


def weight_args(scheme: WeightScheme, shape: tuple[int, int], name: str = "weight") -> QuantizationArgs:
    """How the library describes a matrix of `shape` quantized by `scheme`. Raises BitassayError that names
    the matrix where it cannot.
    """
    fmt, granularity = FORMATS[scheme.format], Granularity.parse(scheme.granularity)
    if fmt.kind == "binary" or fmt.name == "fp8_e5m2":
        why = (
            "its only 8-bit float is e4m3"
            if fmt.kind == "float"
            else "it has no codes of one bit without a zero"
        )
        other = "fp8_e4m3" if fmt.kind == "float" else "ternary"
        raise BitassayError(
            f"{name}: a compressed-tensors folder cannot hold {fmt.name} exactly: {why}",
            f"a recipe with {other}, or keep the model in memory: bitassay.quantize(..., packed=True)",
        )
    kind = "float" if fmt.kind == "float" else "int"
    common = {
        "num_bits": 2 if fmt.kind == "ternary" else int(fmt.bits),
        "type": kind,
        "symmetric": scheme.symmetric,
    }
    columns, size = shape[1], granularity.group_size
    if granularity.name == "tensor":
        return QuantizationArgs(strategy="tensor", **common)  # type: ignore[arg-type]
    if scheme.symmetric and size is None:
        return QuantizationArgs(strategy="channel", **common)  # type: ignore[arg-type]
    if scheme.symmetric and size is not None and columns % size == 0:
        return QuantizationArgs(strategy="group", group_size=size, **common)  # type: ignore[arg-type]
    return QuantizationArgs(strategy="block", block_structure=[1, min(size or columns, columns)], **common)  # type: ignore[arg-type]


def planned_bits(scheme: WeightScheme, shape: tuple[int, int]) -> int:
    """`QuantizedTensor.stored_bits` of a matrix of `shape`, without quantizing it."""
    fmt, packing = FORMATS[scheme.format], PACKINGS[FORMATS[scheme.format].bits]
    rows, groups = Granularity.parse(scheme.granularity).scale_shape(*shape)
    grids = rows * groups * getattr(torch, scheme.scale_dtype).itemsize
    if not scheme.symmetric:
        grids += grids if fmt.kind == "binary" else packing.packed_bytes(rows * groups)
    return (packing.packed_bytes(shape[0] * shape[1]) + grids) * 8


def planned_bytes(scheme: WeightScheme, shape: tuple[int, int], name: str = "weight") -> int:
    """Bytes of `stored_tensors` of a matrix of `shape`, without quantizing it; errors as `weight_args`."""
    args = weight_args(scheme, shape, name)
    rows, groups = Granularity.parse(scheme.granularity).scale_shape(*shape)
    grids = rows * groups * (getattr(torch, scheme.scale_dtype).itemsize + (not scheme.symmetric))
    if args.type == "float":
        return shape[0] * shape[1] + grids
    return shape[0] * math.ceil(shape[1] * args.num_bits / 32) * 4 + 2 * torch.int64.itemsize + grids


def stored_tensors(tensor: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """The tensors of one matrix, under the library's names for them."""
    args = weight_args(tensor.scheme, tensor.shape, name)
    scale = tensor.scale.reshape(1) if args.strategy == "tensor" else tensor.scale
    stored = {"weight_scale": scale.contiguous()}
    if args.type == "float":
        return stored | {"weight": tensor.codes().to(torch.float8_e4m3fn)}
    # Asymmetric codes start at 0 here and at -2^(b-1) there; moving the zero points along leaves q - z as it
    # is.
    shift = 0 if args.symmetric else 2 ** (args.num_bits - 1)
    codes, zero_points = tensor.codes() - shift, tensor.zero_points()
    stored["weight_packed"] = pack_to_int32(codes.to(torch.int8), args.num_bits)
    stored["weight_shape"] = torch.tensor(tensor.shape)
    if zero_points is not None:
        stored["weight_zero_point"] = (zero_points - shift).to(torch.int8).reshape(scale.shape)
    return stored


def quantization_config(model: PreTrainedModel, quantization: Quantization) -> QuantizationConfig:
    """One config group for each distinct description: the commonest targets every Linear, the others name
    theirs; the rest is ignored.
    """
    groups: dict[str, tuple[QuantizationArgs, list[str]]] = {}
    for name, tensor in quantization.tensors.items():
        args = weight_args(tensor.scheme, tensor.shape, name)
        groups.setdefault(args.model_dump_json(), (args, []))[1].append(name)
    largest_first = sorted(groups.values(), key=lambda group: -len(group[1]))
    schemes = {
        f"group_{place}": QuantizationScheme(
            targets=names if place else ["Linear"],
            weights=args,
            format="float-quantized" if args.type == "float" else "pack-quantized",  # type: ignore[arg-type]
        )
        for place, (args, names) in enumerate(largest_first)
    }
    formats = {str(getattr(scheme.format, "value", scheme.format)) for scheme in schemes.values()}
    return QuantizationConfig(
        config_groups=dict(schemes),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_left_alone(model, quantization),
    )


def _left_alone(model: PreTrainedModel, quantization: Quantization) -> list[str]:
    """Modules that a target of every Linear would catch (routers and experts: in engines that build them from
    Linears) but the recipe did not.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = walk(model)
    parents = [name.rpartition(".")[0] for name in (*found.routers, *found.experts)]
    return list(dict.fromkeys(name for name in (*linears, *parents) if name not in quantization.tensors))


def _quantization(model: PreTrainedModel) -> Quantization:
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization) or not quantization.tensors:
        raise BitassayError(
            "this model is not quantized, so there is nothing to export",
            "bitassay.quantize(model, recipe='w4') first",
        )
    return quantization


def _state(model: PreTrainedModel, quantization: Quantization) -> dict[str, Tensor]:
    """The checkpoint: codes and scales instead of the quantized weights, everything else as it is."""
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.removesuffix(".weight") not in quantization.tensors
    }
    for name, tensor in quantization.tensors.items():
        state |= {f"{name}.{part}": value for part, value in stored_tensors(tensor, name).items()}
    return state


def _stored_bits(state: dict[str, Tensor], quantization: Quantization) -> float:
    kept = [
        state[key] for name in quantization.tensors for part in PARTS if (key := f"{name}.{part}") in state
    ]
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in quantization.tensors.values())
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in kept) / weights


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise MissingError where the disk of `folder`, which need not exist yet, has no room for that much."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + MARGIN_BYTES:
        raise MissingError(
            f"{folder}: needs {(needed_bytes + MARGIN_BYTES) / 1e6:.0f} MB, "
            f"{free_bytes / 1e6:.0f} MB are free",
            "free some space or choose another folder",
        )

"""A quantized model as a GGUF file, which llama.cpp and everything built on it runs.

Matrices become blocks (`gguf_blocks.py`). Those that no block type holds are stored in 16 bits (bf16 if the
model is in it, else fp16), and so are the embedding and the head unless a type is named for them
(`gguf_round.py`); vectors in fp32. llama.cpp's "llama" wants the
rotary halves of q and k interleaved: row `2 i + j` of a head is our row `j d/2 + i`. Everything else is
renamed by the gguf package's own table.

llama.cpp rounds the inputs of its products to 8 bits, so its logits are not ours to the bit, whatever the
file says. Left out: mixtures of experts, other families than ARCHITECTURES, rotary embeddings that are
stretched in other ways than linearly, by YaRN or by Llama 3's scheme, windows but Gemma's, rotations at run
time: all refused, with the reason.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.gguf_types import FILE_TYPES
from bitassay.models.identity import identity, tokenizer
from bitassay.models.opened import weights_of
from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.export.gguf_blocks import Blocks, as_blocks, beside_codes
from bitassay.quantization.export.gguf_description import (
    ARCHITECTURES,
    check_description,
    described,
    head_size,
    is_interleaved,
    norm_offset,
    rope_tensors,
    rotation_obstacle,
    window_obstacle,
)
from bitassay.quantization.export.gguf_round import PLAIN, check_type, fitting, rounded
from bitassay.quantization.export.gguf_tokenizer import (
    copy_tokenizer,
    is_tokenizer_of,
    tokenizer_keys,
    write_tokenizer,
)
from bitassay.quantization.export.save import check_space
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import bits_per_weight, cache_slots, quantization_of, size_bytes
from bitassay.quantization.runtime.replicas import is_replica, replica_names
from bitassay.record.files import atomic_file
from bitassay.record.progress import Progress, silent

MORE_BITS = 1.01  # a file beyond that share of its recipe's bits is said to be larger
PIECE_ROWS = 1024  # of a matrix, whose rounding is measured in float64
AT_RUN_TIME = ("activations", "kv_cache")  # parts of a recipe that no weight shows
RECIPE_KEY, BASE_KEY = "bitassay.recipe_id", "bitassay.base_weights_sha256"
EMBEDDINGS_KEY, LIKE = "bitassay.embeddings", "as in another file"
EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass
class GgufFile:
    """What was written. `stored_as` counts matrices by scheme and block type, such as `int4 g32 -> Q4_0`;
    `relative_error` is the length of what rounding to the blocks changed in the quantized matrices, by
    theirs; `notes` say what the file does not hold."""

    path: Path
    stored_as: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    bits_per_weight: float = 0.0
    relative_error: float = 0.0

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size


def write_gguf(
    model: PreTrainedModel,
    path: str | Path,
    *,
    embeddings: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    progress: Progress = silent,
) -> GgufFile:
    """Write a model, quantized (fake or packed) or not, into the new file `path`. embeddings: the type of the
    embedding and of the head, such as Q8_0; rows that its blocks do not divide take Q8_0, or F16. None: 16
    bits. kinds: the type of every tensor by its name in the file, such as another file has; a matrix is
    refused whose codes do not fit. Raises BitassayError for what llama.cpp would run as another model,
    MissingError where the disk is too small."""
    if embeddings is not None:
        check_type(embeddings)
    path, config, done = Path(path), model.config.get_text_config(), quantization_of(model)
    recipe = None if done is None else done.recipe
    check_gguf(model, recipe)
    if path.exists():
        raise BitassayError(f"{path}: exists already", "choose another file or remove this one first")
    progress(f"arranging {path.name} for llama.cpp")
    left_out = [part for part in AT_RUN_TIME if getattr(recipe, part, None) is not None]
    notes = [f"{part}: left out, llama.cpp has its own way" for part in left_out]
    base, ours = identity(model).source.gguf, tokenizer(model)
    if base is not None and not is_tokenizer_of(base, ours):
        base = None
    keys, more = tokenizer_keys(ours, config.vocab_size, _ends(model)) if base is None else ({}, [])
    written = GgufFile(path, notes=[*notes, *more])
    check_space(path, 2 * size_bytes(model))  # the tensors, and the file that they become
    with (
        atomic_file(path) as temporary,
        TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as parts,
    ):
        tensors = {
            name: _Stored.of(blocks, Path(parts) / str(number))
            for number, (name, blocks) in enumerate(_tensors(model, written, embeddings, kinds or {}))
        }
        if done is not None:
            recipe_bits = bits_per_weight(model)
            if written.bits_per_weight > MORE_BITS * recipe_bits:
                written.notes.append(more_bits(recipe_bits, written.bits_per_weight))
        progress(f"writing {path}")
        writer = GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
        _write_description(writer, model, config, tensors)
        if done is not None:
            writer.add_string(EMBEDDINGS_KEY, embeddings or (LIKE if kinds else ""))
        if base is None:
            write_tokenizer(writer, keys)
        else:
            copy_tokenizer(writer, base)
        for name, tensor in tensors.items():
            size = tensor.file.stat().st_size
            writer.add_tensor_info(name, tensor.shape, tensor.dtype, size, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(np.fromfile(tensor.file, tensor.dtype).reshape(tensor.shape))
        writer.close()
    return written


class _Stored(NamedTuple):
    """A tensor's blocks in a file of their own, until the header is known that stands before all of them."""

    file: Path
    kind: Kind
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, blocks: Blocks, file: Path) -> "_Stored":
        blocks.data.tofile(file)
        return cls(file, blocks.kind, blocks.data.shape, blocks.data.dtype)


def check_gguf(model: PreTrainedModel, recipe: Recipe | None) -> None:
    """Refuse what a GGUF file cannot say, or llama.cpp does not do; the model may be on the meta device."""
    config = model.config.get_text_config()
    rotation, plan = getattr(recipe, "rotation", None), getattr(recipe, "replication", None)
    is_known = config.model_type in ARCHITECTURES
    wrong = {
        f"models of the {config.model_type} family are not written, only {', '.join(ARCHITECTURES)}": (
            not is_known
        ),
        **({obstacle: True} if is_known and (obstacle := rotation_obstacle(config)) else {}),
        **({obstacle: True} if is_known and (obstacle := window_obstacle(config)) else {}),
        "llama.cpp does not rotate at run time, as this recipe does": getattr(rotation, "online", False),
        "llama.cpp does not divide inputs at run time, as this recipe's smoothing does": getattr(
            getattr(recipe, "smoothing", None), "at_run_time", False
        ),
        "passes that are weighed, parallel or stopped are not written; plain serial ones become layers": (
            plan is not None and plan.at_run_time and not plan.is_deeper_model
        ),
    }
    for why, is_so in wrong.items():
        if is_so:
            raise BitassayError(f"{type(model).__name__} as GGUF: {why}", "save a folder: --out")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = [name for name in _stored(model) if name not in tied and not is_replica(name)]
    check_description(model, [_named(model, name) for name in names])


def more_bits(recipe: float, file: float) -> str:
    """Return the warning of a file that takes more bits a weight than its recipe."""
    return (
        f"{file:.2f} bits a weight in this file, {recipe:.2f} in the recipe: llama.cpp has no type that "
        "holds it in fewer; the recipes gguf-... are on its own grids"
    )


def _tensors(
    model: PreTrainedModel, written: GgufFile, embeddings: str | None, kinds: Mapping[str, Kind]
) -> Iterator[tuple[str, Blocks]]:
    config = model.config.get_text_config()
    quantized = {} if (done := quantization_of(model)) is None else done.tensors
    bits = weights = 0
    lost, length = 0.0, 1e-300
    opened, plain = weights_of(model), dict(model.state_dict())
    for unrolled, name in _unrolled(model, _stored(model)):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = _named(model, unrolled)
        tensor = quantized.get(name.removesuffix(".weight"))
        if tensor is None:
            named = kinds[theirs].name if theirs in kinds else embeddings if theirs in EMBEDDINGS else None
            kind, data = _plain(plain[name] if opened is None else opened.in_files(name), named)
        else:
            kind, data = _quantized(tensor, model, written, kinds.get(theirs))
            weight = tensor.dequantize()
            for rows in range(0, len(data), PIECE_ROWS):
                part = weight[rows : rows + PIECE_ROWS].double().cpu()
                stored = torch.from_numpy(gguf.dequantize(data[rows : rows + PIECE_ROWS], kind).copy())
                lost += (stored - part).square().sum().item()
                length += part.square().sum().item()
            bits, weights = bits + data.nbytes * 8, weights + weight.numel()
        if is_interleaved(config) and theirs.split(".")[-2] in ("attn_q", "attn_k"):
            order = np.arange(len(data)).reshape(-1, 2, head_size(config) // 2).swapaxes(1, 2)
            data = data[order.reshape(-1)]
        if theirs.endswith("norm.weight"):
            data = data + np.float32(norm_offset(config))
        yield theirs, Blocks(kind, data)
    for name, factors in rope_tensors(config).items():
        yield name, Blocks(Kind.F32, factors)
    written.bits_per_weight = bits / weights if weights else 16.0
    written.relative_error = (lost / length) ** 0.5


def _stored(model: PreTrainedModel) -> list[str]:
    """The names of what a model holds, those of packed matrices as if they were plain."""
    plain, done = list(model.state_dict()), quantization_of(model)
    packed = {} if done is None else done.tensors
    return [*plain, *(f"{name}.weight" for name in packed if f"{name}.weight" not in plain)]


def _ends(model: PreTrainedModel) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _named(model: PreTrainedModel, name: str) -> str:
    names = gguf.get_tensor_name_map(
        ARCHITECTURES[model.config.get_text_config().model_type], cache_slots(model)
    )
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise BitassayError(f"{name}: llama.cpp knows no such tensor", "save a folder: --out")
    return theirs


def _unrolled(model: PreTrainedModel, names: list[str]) -> Iterator[tuple[str, str]]:
    """Each tensor's name in a model that has a layer for every pass, and the name of what it holds."""
    done, prefix = quantization_of(model), f"{module_name(model, decoder_layers(model))}."
    counts = [1] * len(decoder_layers(model))
    for index, steps in ({} if done is None else done.passes).items():
        counts[index] = steps.count
    for name in names:
        if is_replica(name):
            continue
        if not name.startswith(prefix):
            yield name, name
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        layer = int(number)
        copies = [name, *replica_names(model, layer, name, counts[layer])]
        for place, copy in enumerate(copies, start=sum(counts[:layer])):
            yield f"{prefix}{place}.{rest}", copy if copy in names else name


def _quantized(
    tensor: QuantizedTensor, model: PreTrainedModel, written: GgufFile, wanted: Kind | None
) -> Blocks:
    scheme = tensor.scheme
    blocks = as_blocks(tensor, wanted)
    if blocks is None and wanted is not None:
        raise BitassayError(
            f"{wanted.name} does not hold {scheme.format} {scheme.granularity} exactly", "another recipe"
        )
    if blocks is None:
        blocks = _plain(tensor.dequantize().to(model.dtype))
    written.stored_as[
        f"{' + '.join([scheme.format, *beside_codes(tensor)])} {scheme.granularity} -> {blocks.kind.name}"
    ] += 1
    return blocks


def _plain(value: Tensor, name: str | None = None) -> Blocks:
    if name is not None and value.ndim == 1:
        name = None if name == "F32" else name
    if name is not None:
        check_type(name)
        name = fitting(name, value.shape[1])
        if name not in PLAIN:
            return rounded(value, name)
        value = value.to(PLAIN[name])
        if name == "F32":
            return Blocks(Kind.F32, value.cpu().numpy())
    if value.ndim == 1:
        return Blocks(Kind.F32, value.float().cpu().numpy())
    if value.dtype == torch.bfloat16:
        return Blocks(Kind.BF16, value.contiguous().view(torch.uint8).cpu().numpy())
    half = value.half()
    if not half.isfinite().all():
        return Blocks(Kind.F32, value.float().cpu().numpy())
    return Blocks(Kind.F16, half.cpu().numpy())


def _write_description(
    writer: GGUFWriter, model: PreTrainedModel, config: PretrainedConfig, tensors: dict[str, _Stored]
) -> None:
    known, done = identity(model), quantization_of(model)
    kinds = Counter(tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1)
    commonest = kinds.most_common(1)[0][0]
    names = {Kind.F32: "ALL_F32"} | {k: f"MOSTLY_{k.name}_M" for k in (Kind.Q3_K, Kind.Q4_K, Kind.Q5_K)}
    file_type = FILE_TYPES.get(commonest.name)
    if file_type is None:
        file_type = gguf.LlamaFileType[names.get(commonest, f"MOSTLY_{commonest.name}")]
    writer.add_name(known.name if done is None else f"{known.name} {done.recipe.name}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if done is not None:
        writer.add_string(RECIPE_KEY, done.recipe.recipe_id)
        writer.add_string("bitassay.recipe", done.recipe.model_dump_json())
        writer.add_string(BASE_KEY, known.weights_digest)
    prefix = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    for key, value in described(config, cache_slots(model)).items():
        if isinstance(value, float):
            writer.add_float32(f"{prefix}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{prefix}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{prefix}.{key}", value)
        else:
            writer.add_uint32(f"{prefix}.{key}", value)

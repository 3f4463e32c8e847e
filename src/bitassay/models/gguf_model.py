"""The model of a GGUF file as one of transformers: configuration and weights, or a refusal.

Nothing is dropped: a key under the architecture's prefix is taken up by a field of the configuration, where
it is then looked for again, or has a value that changes nothing (`gguf_families.py`); every tensor fills a
parameter, and every parameter is filled. What is left over on either side makes the file be refused, by
name. Two things are filled in: a bias that is not there is zero, and a head that is not there is the
embedding.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

import bitassay.models.gguf_types  # noqa: F401 (the package learns types that it lacks)
from bitassay.errors import BitassayError
from bitassay.models.gguf_families import DERIVED, FAMILIES, HARMLESS, READ_APART, SWITCHES, Family, family_of
from bitassay.models.gguf_rope import ROPE_TENSORS, rope_parameters
from bitassay.models.gguf_vocabulary import fields_of, special_ids
from bitassay.models.weights import write_weights

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LOCAL_BASE = "rope.freq_base_swa"


@dataclass(frozen=True)
class GgufModel:
    """The model of a GGUF file before its weights are read. empty: the model of transformers on the meta
    device. weights: what reads each parameter, by its name there, in float32. generation: what ends texts."""

    empty: PreTrainedModel
    weights: Mapping[str, Callable[[], Tensor]]
    generation: GenerationConfig

    def save(self, folder: Path) -> None:
        """Write the folder that transformers would save, reading a tensor at a time."""
        self.empty.config.architectures = [type(self.empty).__name__]
        self.empty.config.save_pretrained(folder)
        self.generation.save_pretrained(folder)
        shapes = {name: tuple(self.empty.state_dict()[name].shape) for name in self.weights}
        expected = {name: (torch.float32, shape) for name, shape in shapes.items()}
        write_weights(folder, expected, ((name, read()) for name, read in self.weights.items()))


def open_gguf(reader: GGUFReader) -> GgufModel:
    """Describe the model of a file. Raises BitassayError for what is not known here."""
    fields = fields_of(reader)
    family = family_of(fields)
    if family is None:
        read = ", ".join(name for name in FAMILIES if " " not in name)
        raise BitassayError(
            f"general.architecture = {fields.get('general.architecture')}: not read, only {read}"
        )
    if fields.get("split.count", 1) > 1:
        raise BitassayError("split.count: one of several files; merge them first (llama-gguf-split --merge)")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(fields, family, tensors)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = _weights(empty, family, fields["general.architecture"], tensors)
    return GgufModel(empty, weights, _generation(fields))


def read_model(reader: GGUFReader, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a file, in `dtype`. Raises BitassayError for what is not known here."""
    file = open_gguf(reader)
    weights = {name: read() for name, read in file.weights.items()}
    model = type(file.empty).from_pretrained(None, config=file.empty.config, state_dict=weights, dtype=dtype)
    model.generation_config = file.generation
    return model.eval()


def read_config(
    fields: Mapping[str, Any], family: Family, tensors: Mapping[str, Any], vocabulary: int | None = None
) -> PretrainedConfig:
    """Build the configuration that the keys describe, and look for each of them in it again. Without a
    tokenizer among the keys, `vocabulary` says how many tokens there are. Of `tensors`, those that stretch
    rotary embeddings are read; of the others, only the names matter. Raises BitassayError that names keys
    which are not read."""
    prefix = f"{fields['general.architecture']}."
    keys = {
        key.removeprefix(prefix): _shared(key, value)
        for key, value in fields.items()
        if key.startswith(prefix)
    }
    for key in ("embedding_length", "attention.head_count", "context_length", "block_count"):
        if key not in keys:
            raise BitassayError(f"{prefix}{key}: missing")
    # What llama.cpp concludes where a key is missing.
    size = keys.setdefault("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    keys.setdefault("attention.head_count_kv", keys["attention.head_count"])
    kind = type(AutoConfig.for_model(family.model_type))
    declared = {*kind.__dataclass_fields__, *kind.attribute_map}
    taken = {key: name for key in keys if (name := family.field_of(key, declared)) is not None}
    windowed = {PATTERN, LOCAL_BASE} if family.window_period > 1 else set()
    unknown = [
        f"{prefix}{key} = {value}"
        for key, value in keys.items()
        if key not in {*taken, *READ_APART, *windowed} and HARMLESS.get(key) not in (..., value)
    ]
    if unknown:
        raise BitassayError(f"keys that may change what is computed and are not read: {', '.join(unknown)}")
    if keys.get("attention.value_length", size) != size:
        raise BitassayError(f"key_length = {size}, value_length = {keys['attention.value_length']}: not read")
    count = len(fields["tokenizer.ggml.tokens"]) if vocabulary is None else vocabulary
    ids = special_ids(fields, count) if vocabulary is None else {}
    wanted = dict(family.fixed) | {name: keys[key] for key, name in taken.items()}
    wanted |= {"vocab_size": count, "tie_word_embeddings": "output.weight" not in tensors}
    wanted |= {"bos_token_id": ids.get("bos"), "eos_token_id": ids.get("eos")}
    wanted |= {"pad_token_id": ids.get("padding")}
    ends = {name.split(".", 2)[-1] for name in tensors}
    wanted |= {name: not ends.isdisjoint(SWITCHES[name]) for name in SWITCHES if name in declared}
    rotary = int(keys.get("rope.dimension_count", size))
    if rotary != size and not family.partial_rotary:
        raise BitassayError(
            f"{prefix}rope.dimension_count = {rotary}, but heads have {size} numbers: not read"
        )
    factors = {
        name: gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        for name in ROPE_TENSORS
        if name in tensors
    }
    rope = rope_parameters(keys, factors, rotary, wanted["max_position_embeddings"])
    if family.partial_rotary:
        rope["partial_rotary_factor"] = rotary / size
    if "longrope" in rope["rope_type"] and family.model_type == "phi3":
        wanted["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    wanted["rope_parameters"] = rope
    if family.window_period == 1:
        wanted["sliding_window"] = keys.get(WINDOW) or None
    elif family.window_period:
        wanted |= _windows(family, keys, wanted)
    return _checked_config(kind, declared, wanted)


def _windows(family: Family, keys: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers see a window only, and Gemma's rotary embeddings, which differ for these."""
    layers, rope = wanted["num_hidden_layers"], wanted["rope_parameters"]
    pattern = keys.get(PATTERN, family.window_period)
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    if not wanted.get("sliding_window"):
        pattern = [False] * layers
    kinds = ["sliding_attention" if window else "full_attention" for window in pattern]
    scaled = wanted["hidden_size"] // wanted["num_attention_heads"]
    fields = {
        "layer_types": kinds,
        "query_pre_attn_scalar": scaled if layers == family.largest else wanted["head_dim"],
    }
    local = float(keys.get(LOCAL_BASE, 10_000.0))
    if family.model_type == "gemma2":
        if LOCAL_BASE in keys and local != rope["rope_theta"]:
            raise BitassayError(f"{LOCAL_BASE} = {local}: not read for gemma2")
        return fields
    sliding = {"rope_type": "default", "rope_theta": local}
    return {**fields, "rope_parameters": {"full_attention": rope, "sliding_attention": sliding}}


def _checked_config(
    kind: type[PretrainedConfig], declared: set[str], wanted: dict[str, Any]
) -> PretrainedConfig:
    """A configuration with these fields, each of which the class must declare and keep."""
    undeclared = [f"{name} = {value}" for name, value in wanted.items() if name not in {*declared, *DERIVED}]
    if undeclared:
        raise BitassayError(f"{kind.__name__} has no {', '.join(undeclared)}")
    config = kind(**{name: value for name, value in wanted.items() if name in declared})
    derived = {
        "head_dim": config.hidden_size // config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
    }
    lost = [
        f"{name} = {value}"
        for name, value in wanted.items()
        if (getattr(config, name, None) or derived.get(name, getattr(config, name, None))) != value
    ]
    if lost:
        raise BitassayError(f"{kind.__name__} does not take up {', '.join(lost)}")
    return config


def _shared(key: str, value: Any) -> Any:
    """A value, or the one that all layers share; a float32 in its short spelling."""
    if isinstance(value, list) and not key.endswith(PATTERN):
        if len(set(value)) != 1:
            raise BitassayError(f"{key} = {value}: layers that differ in it are not read")
        value = value[0]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _generation(fields: Mapping[str, Any]) -> GenerationConfig:
    """Where generation begins and ends; llama.cpp ends it at the end of a turn and of a message too."""
    ids = special_ids(fields, len(fields["tokenizer.ggml.tokens"]))
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    return GenerationConfig(
        bos_token_id=ids.get("bos"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=ids.get("padding"),
    )


def _weights(
    model: PreTrainedModel, family: Family, architecture: str, tensors: Mapping[str, ReaderTensor]
) -> dict[str, Callable[[], Tensor]]:
    """What reads every parameter of `model` from the file; refuses what is left over on either side."""
    left, config = set(tensors) - set(ROPE_TENSORS), model.config
    weights, missing = dict[str, Callable[[], Tensor]](), list[str]()
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        sources = sources_of(name, architecture, config.num_hidden_layers)
        if absent := [source for source in sources if source not in tensors]:
            missing += [] if name.endswith(".bias") else absent
            weights[name] = partial(torch.zeros, parameter.shape)
            continue
        # Gate and up projections of experts are one parameter in transformers.
        parts = [tuple(map(int, reversed(tensors[source].shape))) for source in sources]
        shape = parts[0] if len(parts) == 1 else (parts[0][0], sum(part[1] for part in parts), *parts[0][2:])
        if [size for size in shape if size != 1] != [size for size in parameter.shape if size != 1]:
            raise BitassayError(
                f"{' and '.join(sources)}: of shape {shape}, but the keys describe {tuple(parameter.shape)}"
            )
        weights[name] = partial(
            _joined, [tensors[source] for source in sources], family, config, parameter.shape
        )
        left -= set(sources)
    if missing:
        raise BitassayError(f"tensors that the architecture needs and the file has not: {_few(missing)}")
    if left:
        raise BitassayError(f"tensors that the model has no place for: {_few(sorted(left))}")
    return weights


def _joined(
    tensors: list[ReaderTensor], family: Family, config: PretrainedConfig, shape: torch.Size
) -> Tensor:
    parts = [_read(tensor, family, config) for tensor in tensors]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(shape)


def sources_of(name: str, architecture: str, layers: int) -> list[str]:
    """Return the tensors of a GGUF file that make the parameter `name` of transformers."""
    if experts := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name):
        return [f"blk.{experts[1]}.ffn_{kind}_exps.weight" for kind in experts[2].split("_")]
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    theirs = gguf.get_tensor_name_map(arch, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    return [theirs or f"(llama.cpp's name for {name})"]


def _read(tensor: ReaderTensor, family: Family, config: PretrainedConfig) -> Tensor:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    value = torch.from_numpy(values if values.flags.writeable else values.copy())  # not the file's own bytes
    name, part = tensor.name, tensor.name.split(".")[-2]
    if family.interleaved and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        # llama.cpp's row 2 i + j of a head is transformers' row j d/2 + i.
        value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    if family.norm_offset and name.endswith("norm.weight"):
        value = value - family.norm_offset
    return value


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more

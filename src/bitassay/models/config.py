"""A model's configuration: read, its text part, and the digests of all in it that changes what is computed.

Weights alone do not say what a model computes: the rotary base, the norm's epsilon, which layers slide, when
a text ends and how a chat is written stand in JSON files beside them. `configuration_digests` names each of
these. Files that say the same in other words give the same digest:

    model       config.json as transformers understands it, reduced to the fewest settings that give this
                configuration; without names, dtypes, what only training reads, and special tokens
    generation  generation_config.json, or what config.json has of it: the end tokens and all that is not
                neutral; without caches and output options
    chat        the chat template or templates, wherever they are stored
    tokenizer   tokenizer_config.json without names, limits, padding and what tokenizer.json holds too
    code        the Python files of a model that runs its own code

Numbers are compared as float32: a GGUF file says 9.99999975e-06 for 1e-05.
"""

import copy
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from bitassay.errors import BitassayError, suggestion
from bitassay.models.weights import read_object
from bitassay.record.hashing import digest_file, digest_json

# Of config.json: bookkeeping, what only training reads, how a result is returned, and special tokens, which
# are in the parts `generation` and `tokenizer`.
_UNUSED = re.compile(
    r"_?name_or_path|_commit_hash|architectures|auto_map|transformers_(version|weights)|(torch_)?dtype|use_cache"
    r"|(.*_)?initializer_(range|factor)|(.*_)?(dropout|pdrop)(_prob)?|router_aux_loss_coef|chunk_size_feed_forward"
    r"|_?output_(attentions|hidden_states|router_logits)|return_dict|_?(attn|experts)_implementation.*"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|torchscript"
    r"|(bos|eos|pad|sep|decoder_start)_token_id|tokenizer_class"
)
_GENERATION_UNUSED = re.compile(
    r"_.*|transformers_version|(bos|pad)_token_id|use_cache|cache_.*|output_.*|return_dict.*|.*compile.*|max_length"
)
_TOKENIZER_UNUSED = re.compile(
    r"_.*|name_or_path|tokenizer_file|vocab_file|merges_file|special_tokens_map_file|transformers_version"
    r"|processor_class|auto_map|backend|is_local|.*local_files_only|chat_template|model_max_length|max_length|max_len"
    r"|(padding|truncation)_(side|strategy)|pad_to_multiple_of|stride|model_input_names|added_tokens_decoder"
    r"|.*special_tokens|clean_up_tokenization_spaces|verbose|device_map"
)
_TEMPLATE_FILE, _TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration of a causal LM. Raises BitassayError for an unknown or another kind."""
    path = folder / "config.json"
    content = read_object(path)
    kind, own_code = content.get("model_type"), "auto_map" in content
    if (not isinstance(kind, str) or kind not in CONFIG_MAPPING) and not (own_code and trust_remote_code):
        if own_code:
            remedy = "--trust-remote-code, where you trust the code that comes with it"
        elif isinstance(kind, str):
            remedy = f"a newer transformers; of what it knows {suggestion(kind, CONFIG_MAPPING)}"
        else:
            remedy = "download or save the model again"
        version = f"transformers {transformers.__version__}"
        raise BitassayError(f"{path}: model_type is {kind!r:.80}, which {version} does not know", remedy)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        raise BitassayError(f"{path}: transformers cannot load it ({error})") from error
    check_causal(config, path)
    return config


# What comes after a token changes what these say about it: CPM-Ant and XLNet see all of a text, XLM too,
# unless its configuration says otherwise, and the buckets of distances of ProphetNet depend on the length.
NOT_CAUSAL = ("cpmant", "prophetnet", "xlm", "xlnet")
REMEDY = "a decoder-only model, such as Llama, Qwen, Gemma, Mistral, GPT-2 or Mamba"


def check_causal(config: PretrainedConfig, folder: str | Path) -> None:
    """Raise BitassayError for whatever is no causal language model, such as an encoder."""
    kind = config.model_type
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    encoders = MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    is_encoder = getattr(config, "is_decoder", None) is False
    reasons = {
        f"{kind} is an encoder-decoder": config.is_encoder_decoder,
        f"in {kind}, what is said about a token depends on what comes after it": kind in NOT_CAUSAL,
        f"{kind} is an encoder here (is_decoder is false), which sees what comes after a token": (
            is_encoder and any(name in encoders for name in config.architectures or ())
        ),
        f"transformers has no causal language model of type {kind}": (
            kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code
        ),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        raise BitassayError(f"{folder}: {why}; only causal language models are read", REMEDY)


def text_config(model: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    """Return the language model's part of a configuration, of a multimodal wrapper or any other."""
    config = model if isinstance(model, PretrainedConfig) else model.config
    return config.get_text_config(decoder=True)


def layer_count(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the number of decoder layers of a checkpoint, by its config.json."""
    return text_config(read_config(folder, trust_remote_code=trust_remote_code)).num_hidden_layers


def untie(model: PreTrainedModel) -> None:
    """Say in the configuration that the output head is no longer the embedding."""
    for config in (model.config, text_config(model)):
        config.tie_word_embeddings = False


def configuration_digests(folder: Path, *, own_code: bool = False) -> dict[str, str]:
    """Return a digest for each part of what the files beside the weights say; see the top of this file.
    own_code: Python code that comes with the model is run, where there is some."""
    config = read_config(folder, trust_remote_code=own_code)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of settings that are only tried out
    try:
        model, generation = _fewest_settings(config), _generation(folder, config)
    finally:
        transformers.logging.set_verbosity(verbosity)
    parts: dict[str, Any] = {"model": model, "generation": generation}
    parts |= {"chat": chat_templates(folder), "tokenizer": _tokenizer_settings(folder)}
    code = read_object(folder / "config.json").get("auto_map")
    if own_code and isinstance(code, dict) and "AutoModelForCausalLM" in code:
        files = {str(path.relative_to(folder)): digest_file(path) for path in folder.rglob("*.py")}
        parts["code"] = {"auto_map": code, "files": files}
    return {name: digest_json(_canonical(part)) for name, part in parts.items()}


def chat_templates(folder: Path) -> dict[str, str]:
    """Read the chat templates by name: those in files win over tokenizer_config.json."""
    templates = {path.stem: path.read_text("utf-8") for path in (folder / _TEMPLATE_FOLDER).glob("*.jinja")}
    if (folder / _TEMPLATE_FILE).is_file():
        templates["default"] = (folder / _TEMPLATE_FILE).read_text("utf-8")
    if templates:
        return templates
    stored = read_object(folder / "tokenizer_config.json", missing={}).get("chat_template")
    if isinstance(stored, list):
        return {str(named["name"]): str(named["template"]) for named in stored}
    return {} if stored is None else {"default": str(stored)}


def _fewest_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of `config` without those that its class would fill in by itself. Names are tried in
    alphabetical order, so that equal configurations lose the same ones."""
    settings = {"model_type": config.model_type, **_used(config.to_dict())}

    def effect() -> Any:
        """What the class makes of the settings; None where it refuses them."""
        try:
            return _canonical(_used(type(config).from_dict(copy.deepcopy(settings)).to_dict()))
        except Exception:
            return None

    wanted = effect()
    if wanted is None:  # a class that cannot read what it writes: nothing can be left out
        return settings
    for holder, key in list(_leaves(settings)):
        value = holder.pop(key)
        if effect() != wanted:
            holder[key] = value
    return _without_empty(settings)


def _leaves(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key in sorted(settings, key=str):
        if isinstance(settings[key], dict):
            yield from _leaves(settings[key])
        elif key != "model_type":
            yield settings, key


def _used(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what changes nothing that is computed, at any depth."""
    return {
        key: _used(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not _UNUSED.fullmatch(str(key))
    }


def _without_empty(settings: dict[str, Any]) -> dict[str, Any]:
    smaller = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {key: value for key, value in smaller.items() if value != {}}


def _generation(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """As transformers loads it, and with the end tokens where `end_tokens` looks for them."""
    has_file = (folder / "generation_config.json").is_file()
    name = "generation_config.json" if has_file else "config.json"
    try:
        loaded = GenerationConfig.from_pretrained(
            folder, config_file_name=name, _from_model_config=not has_file
        )
    except Exception as error:
        raise BitassayError(f"{folder / name}: transformers cannot load it ({error})") from error
    neutral = GenerationConfig._get_default_generation_params()
    settings = {
        key: value
        for key, value in loaded.to_dict().items()
        if not _GENERATION_UNUSED.fullmatch(key) and value is not None and value != neutral.get(key)
    }
    ends = settings.pop("eos_token_id", None)
    ends = getattr(text_config(config), "eos_token_id", None) if ends is None else ends
    return settings | {"eos_token_id": sorted({ends} if isinstance(ends, int) else set(ends or ()))}


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    settings = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in read_object(folder / "tokenizer_config.json", missing={}).items()
        if not _TOKENIZER_UNUSED.fullmatch(key) and value is not None
    }
    if isinstance(kind := settings.get("tokenizer_class"), str):
        settings["tokenizer_class"] = kind.removesuffix("Fast")
    return settings


def _canonical(value: Any) -> Any:
    """`value` with text keys, and with numbers as float32 has them."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if not isinstance(value, float):
        return value if value is None or isinstance(value, (bool, int, str)) else str(value)
    if value.is_integer():
        return int(value)
    if not math.isfinite(value):
        return str(value)
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 3e38 else value

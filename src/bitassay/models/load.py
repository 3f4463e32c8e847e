"""Load a causal LM, with its tokenizer and its identity attached."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import decompress_module
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitassay.errors import BitassayError, BitassayWarning, MissingError, suggestion
from bitassay.models.checkpoint import read_card
from bitassay.models.config import configuration_digests, read_config, text_config
from bitassay.models.device import as_device
from bitassay.models.positions import forget_lengths
from bitassay.models.source import Source, resolve
from bitassay.models.transposed import as_linears
from bitassay.models.weights import check_files, stored_tensors, stray_files
from bitassay.record.hashing import digest_file, digest_json, digest_tensors
from bitassay.record.progress import Progress, silent

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

AUTO = "auto"  # SDPA where the architecture has it, else what transformers chooses

# What vocabularies are called; "tokenizer.*json" leaves tokenizer_config.json out, which has none.
VOCABULARIES = ("tokenizer.*json", "*.model", "*vocab*", "merges*", "*.tiktoken", "tekken.json")

# What transformers needs to load a checkpoint of such a method; the package's extras are named alike.
PACKAGES_OF_METHOD = {
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes",),
}


@dataclass(frozen=True)
class Identity:
    """Which model this is. Digests are of the files that are loaded, as stored, whatever dtype the model was
    loaded in; `recipe_id` says which recipe was applied afterwards (None: none). own_code: Python code that
    comes with the model is run, and then belongs to its configuration."""

    source: Source
    recipe_id: str | None = None
    recipe_name: str | None = None
    own_code: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def weights_digest(self) -> str:
        return digest_tensors(stored_tensors(self.source.folder))

    @cached_property
    def tokenizer_digest(self) -> str:
        folder = self.source.folder
        usual = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        files = [folder / name for name in usual if (folder / name).is_file()] or vocabularies(folder)
        return digest_json({path.name: digest_file(path) for path in files})

    @cached_property
    def configuration(self) -> dict[str, str]:
        """Digests of what the files beside the weights say, by part: see `models/config.py`."""
        return configuration_digests(self.source.folder, own_code=self.own_code)

    @property
    def config_digest(self) -> str:
        return digest_json(self.configuration)

    def with_recipe(self, recipe_id: str, recipe_name: str) -> "Identity":
        return replace(self, recipe_id=recipe_id, recipe_name=recipe_name)


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = AUTO,
    revision: str | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Load `model`: a catalogue name, a local folder, a local GGUF file or a Hugging Face id.

    Returns the transformers model in eval mode, without gradients, with `.tokenizer` and `.identity` set. A
    folder that `bitassay quantize` wrote comes back as `quantize` made it, with its `.quantization`: fake, or
    as codes where `packed`. attention: an implementation that transformers knows; "auto" is SDPA where the
    architecture has it, else what transformers chooses. revision: a branch, tag or commit of a Hugging Face
    id (`id@revision` says the same). Raises BitassayError where the files are missing, truncated or not
    finite, MissingError where they cannot be fetched. Warns of files that look like weights and are none.
    """
    wanted, where, chosen = as_dtype(dtype), as_device(device), as_attention(attention)
    source = resolve(model, progress, revision=revision)
    check_files(source.folder)
    for stray in stray_files(source.folder):
        message = f"{stray}: nothing loads this file, so it is no part of the model; remove it"
        warnings.warn(message, BitassayWarning, stacklevel=2)
    card = read_card(source.folder)
    if packed and card is None:
        raise BitassayError(
            f"{source.folder}: holds no codes that `bitassay quantize` wrote",
            "bitassay.quantize(model, recipe='w4', packed=True)",
        )
    config = read_config(source.folder, trust_remote_code=trust_remote_code)
    tokenizer = _read_tokenizer(source.folder, trust_remote_code)
    try:
        if card is None:
            loaded = _plain(source.folder, config, wanted, chosen, trust_remote_code)
        else:
            loaded = _reader()(
                source.folder,
                card,
                config,
                dtype=wanted,
                attention=chosen,
                trust_remote_code=trust_remote_code,
                packed=packed,
            )
    except BitassayError:
        raise
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        remedy = "" if chosen is None else f"attention {AUTO}, which takes what the model supports"
        raise BitassayError(f"{source.folder}: transformers cannot load it ({error})", remedy) from error
    check_finite(loaded, source.folder)
    forget_lengths(loaded)
    own_code = type(loaded).__module__.startswith("transformers_modules.")
    known = Identity(source, own_code=own_code)
    if card is not None:
        known = known.with_recipe(card.recipe_id, card.recipe_name)
    if chosen is None and (in_force := attention_of(loaded)) != "sdpa":
        progress(f"{known.name}: {type(loaded).__name__} has no SDPA attention; it runs with {in_force}")
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(loaded, "tokenizer", tokenizer)
    object.__setattr__(loaded, "identity", known)
    return loaded.eval().requires_grad_(False).to(where)  # type: ignore[arg-type]


def layer_count(source: Source, *, trust_remote_code: bool = False) -> int:
    """How many decoder layers a model has, without its weights. Raises BitassayError for a config.json that
    does not say."""
    config = text_config(read_config(source.folder, trust_remote_code=trust_remote_code))
    return config.num_hidden_layers


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation in force."""
    return str(text_config(model)._attn_implementation)


def vocabularies(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer is read from."""
    return sorted({path for pattern in VOCABULARIES for path in folder.glob(pattern) if path.is_file()})


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises BitassayError for a folder without a vocabulary, of which transformers makes an
    empty tokenizer without a word."""
    without = BitassayError(
        f"{folder}: no tokenizer files (such as tokenizer.json, tokenizer.model or vocab.json)",
        "tokenizer.save_pretrained(folder) with the tokenizer of the model that this one was made of",
    )
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the readers raise whatever the defect happens to trip over
        if not vocabularies(folder):
            raise without from error
        raise BitassayError(
            f"{folder}: transformers cannot load the tokenizer ({type(error).__name__}: {error})",
            "restore the tokenizer files that came with the model",
        ) from error
    if found.vocab_files_names and not vocabularies(folder):  # some, such as those of bytes, need none
        raise without
    return found


def _reader() -> Callable[..., PreTrainedModel]:
    """What reads our quantized folders. It belongs to `quantize`, which is built on this file, so it is only
    named here."""
    return import_module("bitassay.quantization.export.reload").read_quantized


def _plain(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, attention: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A folder that transformers loads."""
    check_method(config, folder)
    compressed = is_compressed(config)
    loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        folder,
        config=config,
        dtype=torch.float32 if compressed else dtype,  # scales must not be rounded before they are used
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, with names
        output_loading_info=True,
    )
    check_keys(report, folder)
    if compressed:
        make_dense(loaded, dtype, folder)
    as_linears(loaded)
    return loaded


def check_method(config: PretrainedConfig, folder: Path) -> None:
    """Refuse a quantized checkpoint whose packages are not here, or whose cache is quantized too. Raises
    MissingError that says which extra has them, BitassayError for the cache."""
    method, said = quantization_method(config), _quantization_config(config)
    if said.get("kv_cache_scheme"):
        raise BitassayError(
            f"{folder}: the checkpoint quantizes the KV cache too, which is not read",
            "a checkpoint without kv_cache_scheme",
        )
    missing = [name for name in PACKAGES_OF_METHOD.get(method, ()) if find_spec(name) is None]
    if missing:
        raise MissingError(
            f"{folder}: a checkpoint in the {method} format, which needs {' and '.join(missing)}",
            f"pip install 'bitassay[{method}]'",
        )


def quantization_method(config: PretrainedConfig) -> str:
    """What the checkpoint's config says it is quantized by; empty where it says nothing."""
    return str(_quantization_config(config).get("quant_method", ""))


def _quantization_config(config: PretrainedConfig) -> dict[str, Any]:
    said = getattr(config, "quantization_config", None) or {}
    return said if isinstance(said, dict) else said.to_dict()


def is_compressed(config: PretrainedConfig) -> bool:
    """Whether the checkpoint holds codes in the compressed-tensors format."""
    return quantization_method(config) == "compressed-tensors"


def make_dense(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Decode a compressed-tensors model that was loaded in fp32 into plain weights of `dtype`, as `quantize`
    makes them; linears whose inputs are rounded keep the library's forward, which does it.

    Raises BitassayError where it also quantizes what leaves a linear, which would silently be left out, and
    where a stored shape is not the module's.
    """
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            if scheme.output_activations is not None:
                raise BitassayError(
                    f"{folder}: {name}: the checkpoint quantizes what leaves a linear, which is not read",
                    "a checkpoint that quantizes weights, or weights and inputs",
                )
            _check_stored_shape(module, name, folder)
            decompress_module(module, leave_decompressed=scheme.input_activations is not None)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    quantizer: Any = model.hf_quantizer
    quantizer.compressor.remove_decompression_hook(model)
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config  # type: ignore[attr-defined]
    model.config.dtype = dtype


def _check_stored_shape(module: nn.Module, name: str, folder: Path) -> None:
    stored = getattr(module, "weight_shape", None)
    if stored is None or not isinstance(module, nn.Linear):
        return
    if stored.tolist() != [module.out_features, module.in_features]:
        raise BitassayError(
            f"{folder}: {name}.weight_shape says {stored.tolist()}, "
            f"config.json {[module.out_features, module.in_features]}",
            "download or save the checkpoint again",
        )


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise BitassayError(f"unknown dtype {dtype!r}; {suggestion(dtype, DTYPES)}")
    return DTYPES[dtype]


def as_attention(attention: str) -> str | None:
    """What transformers calls it: None leaves the choice to the model's class. Raises BitassayError for a
    name that nobody knows; `owner/name` is a kernel of the hub."""
    known = [AUTO, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention not in known and "/" not in attention:
        raise BitassayError(f"unknown attention {attention!r}; {suggestion(attention, known)}")
    return None if attention == AUTO else attention


def identity(model: PreTrainedModel) -> Identity:
    """The identity of a model that came from `load` or `quantize`."""
    if not isinstance(getattr(model, "identity", None), Identity):
        raise BitassayError("this model has no identity", "load it with bitassay.load(...)")
    return model.identity  # type: ignore[return-value]


def tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` attached (or that the caller set as `model.tokenizer`)."""
    if getattr(model, "tokenizer", None) is None:
        raise BitassayError(
            "this model has no tokenizer", "load it with bitassay.load(...), or set model.tokenizer"
        )
    return model.tokenizer  # type: ignore[return-value]


def check_keys(report: Any, folder: Path) -> None:
    """Refuse a model whose weights are not the checkpoint's: transformers makes up the ones that are missing
    or of another shape, and drops layers that the configuration does not mention. `report` is what
    `from_pretrained` returns as loading info."""
    unused = [key for key in report.get("unexpected_keys", ()) if ".layers." in key]
    defects = {
        "missing": sorted(report.get("missing_keys", ())),
        "of another shape than config.json says": sorted(key[0] for key in report.get("mismatched_keys", ())),
        "of layers that config.json does not have": sorted(unused),
    }
    for defect, keys in defects.items():
        if keys:
            raise BitassayError(
                f"{folder}: {len(keys)} weights are {defect}, the first is {keys[0]}",
                "download or save the checkpoint again",
            )


def check_finite(model: PreTrainedModel, where: str | Path) -> None:
    """Refuse weights with NaN or infinity, naming the first tensor that has one."""
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and not torch.isfinite(parameter.float().sum())
            and not parameter.isfinite().all()
        ):
            bad = int((~parameter.isfinite()).sum())
            raise BitassayError(
                f"{where}: {name} has {bad} values that are NaN or infinite",
                "restore the checkpoint from its source",
            )

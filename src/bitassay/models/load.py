"""Load a causal LM, with its tokenizer and its identity attached."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import decompress_module
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.models.causal import check_causal
from bitassay.models.checkpoint import read_card
from bitassay.models.positions import forget_lengths
from bitassay.models.source import Source, resolve
from bitassay.models.transposed import as_linears
from bitassay.record.hashing import digest_file, digest_json, digest_tensors
from bitassay.record.progress import Progress, silent

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

# What transformers needs to load a checkpoint of such a method; the package's extras are named alike.
PACKAGES_OF_METHOD = {
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes",),
}


@dataclass(frozen=True)
class Identity:
    """Which model this is. Digests are of the files as stored, whatever dtype the model was loaded in;
    `recipe_id` says which recipe was applied afterwards (None: none)."""

    source: Source
    recipe_id: str | None = None
    recipe_name: str | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def weights_digest(self) -> str:
        return digest_tensors(stored_tensors(self.source.folder))

    @cached_property
    def tokenizer_digest(self) -> str:
        folder = self.source.folder
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        return digest_json({name: digest_file(folder / name) for name in names if (folder / name).is_file()})

    def with_recipe(self, recipe_id: str, recipe_name: str) -> "Identity":
        return replace(self, recipe_id=recipe_id, recipe_name=recipe_name)


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    packed: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Load `model`: a catalogue name, a local folder, a local GGUF file or a Hugging Face id.

    Returns the transformers model in eval mode, without gradients, with `.tokenizer` and `.identity` set. A
    folder that `bitassay quantize` wrote comes back as `quantize` made it, with its `.quantization`: fake, or
    as codes where `packed`. Raises BitassayError where the files are missing, truncated or not finite,
    MissingError where they cannot be fetched.
    """
    source = resolve(model, progress)
    check_files(source.folder)
    card = read_card(source.folder)
    wanted = as_dtype(dtype)
    if packed and card is None:
        raise BitassayError(
            f"{source.folder}: holds no codes that `bitassay quantize` wrote",
            "bitassay.quantize(model, recipe='w4', packed=True)",
        )
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        check_causal(config, source.folder)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        if card is None:
            loaded = _plain(source.folder, config, wanted, attention, trust_remote_code)
        else:
            loaded = _reader()(
                source.folder,
                card,
                config,
                dtype=wanted,
                attention=attention,
                trust_remote_code=trust_remote_code,
                packed=packed,
            )
    except BitassayError:
        raise
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        raise BitassayError(f"{source.folder}: transformers cannot load it ({error})") from error
    check_finite(loaded, source.folder)
    forget_lengths(loaded)
    known = Identity(source) if card is None else Identity(source, card.recipe_id, card.recipe_name)
    # nn.Module's own __setattr__ is for tensors and modules.
    object.__setattr__(loaded, "tokenizer", tokenizer)
    object.__setattr__(loaded, "identity", known)
    return loaded.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]


def layer_count(source: Source, *, trust_remote_code: bool = False) -> int:
    """How many decoder layers a model has, without its weights. Raises BitassayError for a config.json that
    does not say."""
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        return config.get_text_config(decoder=True).num_hidden_layers
    except Exception as error:
        raise BitassayError(f"{source.folder}: no config.json that transformers reads ({error})") from error


def _reader() -> Callable[..., PreTrainedModel]:
    """What reads our quantized folders. It belongs to `quantize`, which is built on this file, so it is only
    named here."""
    return import_module("bitassay.quantize.reload").read_quantized


def _plain(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool
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


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's safetensors files, sorted by name, read one at a time."""
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    open_path, file = None, None
    for name in sorted(where):
        if where[name] != open_path:
            open_path, file = where[name], safe_open(where[name], framework="pt")
        assert file is not None
        yield name, file.get_tensor(name)


def check_files(folder: Path) -> None:
    """Refuse a folder with a truncated or malformed safetensors file, naming the file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise BitassayError(
                f"{path}: truncated or not a safetensors file ({error})", "download or save it again"
            ) from error


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

"""Load a checkpoint that transformers reads, with its tokenizer and its identity attached.

`bitassay.load` (`engines/load.py`) is built on it, and reads what `bitassay quantize` wrote too.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bitassay.errors import BitassayError, BitassayWarning, MissingError
from bitassay.models.config import read_config
from bitassay.models.identity import Identity, attach, vocabularies
from bitassay.models.opened import is_opened, open_plain
from bitassay.models.options import AUTO, LoadOptions, attention_of
from bitassay.models.packed_codes import decode, read_packed, without_order
from bitassay.models.positions import forget_lengths
from bitassay.models.source import Source
from bitassay.models.transposed import as_linears
from bitassay.models.weights import AGAIN, check_files, check_finite, check_keys, stray_files
from bitassay.record.progress import Progress, silent

Reader = Callable[[Path, PretrainedConfig, LoadOptions], PreTrainedModel]

# What transformers needs to load a checkpoint of such a method; this package's extras have the same names.
PACKAGES_OF_METHOD = {
    "awq": ["gptqmodel"],
    "gptq": ["gptqmodel", "optimum"],
    "bitsandbytes": ["bitsandbytes"],
}


def load_checkpoint(
    source: Source,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    progress: Progress = silent,
    read: Reader | None = None,
) -> PreTrainedModel:
    """Load the checkpoint in a folder: in eval mode, without gradients, with `.tokenizer` and `.identity`.
    read: what makes the model of the folder and its configuration, by default transformers. Raises
    BitassayError where the files are missing, truncated or not finite. Warns of files that look like weights
    and are none."""
    folder = source.folder
    check_files(folder)
    for stray in stray_files(folder):
        message = f"{stray}: nothing loads this file, so it is no part of the model; remove it"
        warnings.warn(message, BitassayWarning, stacklevel=3)
    config = read_config(folder, trust_remote_code=options.trust_remote_code)
    tokenizer = read_tokenizer(folder, options.trust_remote_code)
    try:
        model = (read or (open_plain if options.opened else read_plain))(folder, config, options)
    except BitassayError:
        raise
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        remedy = "" if options.attention is None else f"attention {AUTO}, which takes what the model supports"
        raise BitassayError(f"{folder}: transformers cannot load it ({error})", remedy) from error
    hosted = model.device.type == "meta"  # another engine has the weights
    if not is_opened(model) and not hosted:
        check_finite(model.named_parameters(), folder)
    forget_lengths(model)
    if not hosted and options.attention is None and (attention := attention_of(model)) != "sdpa":
        progress(f"{source.name}: {type(model).__name__} has no SDPA attention; it runs with {attention}")
    own_code = type(model).__module__.startswith("transformers_modules.")
    attach(model, tokenizer=tokenizer, identity=Identity(source, own_code=own_code))
    model.eval().requires_grad_(False)
    return model if is_opened(model) or hosted else model.to(options.device)  # type: ignore[arg-type]


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer. Raises BitassayError without a vocabulary: transformers makes an empty one then."""
    failed: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not tokenizer.vocab_files_names or vocabularies(folder):  # those of bytes need no files
            return tokenizer
    except Exception as error:  # the readers raise whatever the defect happens to trip over
        failed = error
    if failed is not None and vocabularies(folder):
        raise BitassayError(
            f"{folder}: transformers cannot load the tokenizer ({type(failed).__name__}: {failed})",
            "restore the tokenizer files that came with the model",
        ) from failed
    raise BitassayError(
        f"{folder}: no tokenizer files (such as tokenizer.json, tokenizer.model or vocab.json)",
        "tokenizer.save_pretrained(folder) with the tokenizer of the model that this one was made of",
    ) from failed


def read_plain(folder: Path, config: PretrainedConfig, options: LoadOptions) -> PreTrainedModel:
    """Read a folder that transformers loads. Raises BitassayError where its weights are not those that the
    configuration describes, MissingError where its format needs a package that is not installed."""
    quantization = getattr(config, "quantization_config", None) or {}
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    check_quantization(settings, folder)
    compressed = settings.get("quant_method") == "compressed-tensors"
    if compressed:
        config.quantization_config = without_order(settings)
    model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        folder,
        config=config,
        dtype=torch.float32 if compressed else options.dtype,  # scales must stay exact until used
        attn_implementation=options.attention,
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, with names
        output_loading_info=True,
    )
    orders = read_packed(model, report, folder) if compressed else {}
    check_keys(report, folder)
    if compressed:
        make_dense(model, options.dtype, folder, orders)
    as_linears(model)
    return model


def check_quantization(settings: dict[str, Any], folder: Path) -> None:
    """Refuse a quantized checkpoint whose packages are not here (MissingError), or whose cache is quantized
    too (BitassayError). `settings`: the quantization_config of its config.json, empty where it has none."""
    if settings.get("kv_cache_scheme"):
        raise BitassayError(
            f"{folder}: the checkpoint quantizes the KV cache too, which is not read",
            "a checkpoint without kv_cache_scheme",
        )
    method = str(settings.get("quant_method", ""))
    missing = [name for name in PACKAGES_OF_METHOD.get(method, ()) if find_spec(name) is None]
    if missing:
        raise MissingError(
            f"{folder}: a checkpoint in the {method} format, which needs {' and '.join(missing)}",
            f"pip install 'bitassay[{method}]'",
        )


def make_dense(
    model: PreTrainedModel, dtype: torch.dtype, folder: Path, orders: dict[str, torch.Tensor]
) -> None:
    """Decode a compressed-tensors model that was loaded in fp32 into plain weights of `dtype`, as `quantize`
    makes them; linears whose inputs are rounded keep the library's forward, which rounds them. orders: how
    columns are sorted by their groups, of linears that have an order. Raises BitassayError where it also
    quantizes the outputs of a linear, which would silently be left out, and where a stored shape is not the
    module's."""
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            if scheme.output_activations is not None:
                raise BitassayError(
                    f"{folder}: {name}: the checkpoint quantizes what leaves a linear, which is not read",
                    "a checkpoint that quantizes weights, or weights and inputs",
                )
            stored = getattr(module, "weight_shape", None)
            if stored is not None and isinstance(module, nn.Linear):
                shape = [module.out_features, module.in_features]
                if stored.tolist() != shape:
                    why = f"{name}.weight_shape says {stored.tolist()}, config.json {shape}"
                    raise BitassayError(f"{folder}: {why}", AGAIN)
            rounds_inputs = scheme.input_activations is not None
            decode(module, orders.get(name), leave_decompressed=rounds_inputs)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    quantizer: Any = model.hf_quantizer
    quantizer.compressor.remove_decompression_hook(model)
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config  # type: ignore[attr-defined]
    model.config.dtype = dtype

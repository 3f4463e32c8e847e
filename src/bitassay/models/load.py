"""Load a causal LM, with its tokenizer and its identity attached."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitassay.errors import BitassayError, nearest
from bitassay.models.source import Source, resolve
from bitassay.record.hashing import digest_file, digest_json, digest_tensors
from bitassay.record.progress import Progress, silent

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Identity:
    """Which model this is. Digests are of the files as stored, whatever dtype the model was loaded in; `recipe_id` says
    which recipe was applied afterwards (None: none)."""

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
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Load `model`: a catalogue name, a local folder, a local GGUF file or a Hugging Face id.

    Returns the transformers model in eval mode, without gradients, with `.tokenizer` and `.identity` set. Raises BitassayError where
    the files are missing, truncated or not finite, MissingError where they cannot be fetched.
    """
    source = resolve(model, progress)
    check_files(source.folder)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=as_dtype(dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise BitassayError(f"{source.folder}: transformers cannot load it ({error})") from error
    if missing := sorted(report.get("missing_keys", ())):
        raise BitassayError(
            f"{source.folder}: {len(missing)} weights are missing, the first is {missing[0]}; transformers would have made them up",
            "download or save the checkpoint again",
        )
    check_finite(loaded, source.folder)
    loaded.tokenizer = tokenizer
    loaded.identity = Identity(source)
    return loaded.eval().requires_grad_(False).to(device)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise BitassayError(f"unknown dtype {dtype!r}; the nearest are {nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def identity(model: PreTrainedModel) -> Identity:
    """The identity of a model that came from `load` or `quantize`."""
    if not isinstance(getattr(model, "identity", None), Identity):
        raise BitassayError("this model has no identity", "load it with bitassay.load(...)")
    return model.identity  # type: ignore[return-value]


def tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` attached (or that the caller set as `model.tokenizer`)."""
    if getattr(model, "tokenizer", None) is None:
        raise BitassayError("this model has no tokenizer", "load it with bitassay.load(...), or set model.tokenizer")
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


def check_finite(model: PreTrainedModel, where: str | Path) -> None:
    """Refuse weights with NaN or infinity, naming the first tensor that has one."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.float().sum()) and not parameter.isfinite().all():
            bad = int((~parameter.isfinite()).sum())
            raise BitassayError(
                f"{where}: {name} has {bad} values that are NaN or infinite", "restore the checkpoint from its source"
            )

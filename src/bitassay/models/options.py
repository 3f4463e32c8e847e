"""How a model is loaded: dtype, device and attention, checked by name before there is work for them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.models.config import text_config

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
AUTO = "auto"  # SDPA where the architecture has it, else what transformers chooses


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded. attention: a name of transformers; None leaves it to the model's class.
    opened: its weights are read when they are needed (`opened.py`)."""

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    attention: str | None = None
    trust_remote_code: bool = False
    opened: bool = False


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name. Raises BitassayError for a name that is not in DTYPES."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise BitassayError(f"unknown dtype {dtype!r}; {suggestion(dtype, DTYPES)}")
    return DTYPES[dtype]


def as_attention(attention: str) -> str | None:
    """Return what transformers calls an attention; None leaves the choice to the model's class. Raises
    BitassayError for an unknown name; `owner/name` is a kernel of the hub."""
    known = [AUTO, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention not in known and "/" not in attention:
        raise BitassayError(f"unknown attention {attention!r}; {suggestion(attention, known)}")
    return None if attention == AUTO else attention


def attention_of(model: PreTrainedModel) -> str:
    """Return the attention implementation in force."""
    return str(text_config(model)._attn_implementation)


def as_device(name: str) -> torch.device:
    """Return a device. Raises BitassayError for a name of none, MissingError for one that is not here."""
    example = "cpu, cuda, cuda:1 or mps"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BitassayError(f"{name!r} is no device", example) from error
    if device.type == "cpu":
        return device
    if device.type == "meta":
        raise BitassayError(f"{name!r} computes nothing", example)
    backend = getattr(torch, device.type, None)
    if backend is None or not getattr(backend, "is_available", bool)():
        no_cuda = device.type == "cuda" and not (torch.version.cuda or torch.version.hip)
        why = f"no device {name!r} here{': this torch has no CUDA' if no_cuda else ''}"
        raise MissingError(why, "--device cpu; `bitassay doctor` lists what is here")
    if device.index is not None and device.index >= backend.device_count():
        why = f"no device {name!r} here: {backend.device_count()} of them, numbered from 0"
        raise MissingError(why, "`bitassay doctor` lists them")
    return device

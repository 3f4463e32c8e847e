"""Load a model of any kind that is read: `load`."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitassay.engines.engine import TRANSFORMERS
from bitassay.engines.hosted import check_engine, load_hosted
from bitassay.errors import BitassayError
from bitassay.models.empty import without_weights
from bitassay.models.load import load_checkpoint
from bitassay.models.options import AUTO, LoadOptions, as_attention, as_device, as_dtype
from bitassay.models.source import resolve
from bitassay.models.weights import check_files
from bitassay.quantization.export.card import read_card
from bitassay.quantization.export.reload import load_quantized
from bitassay.quantization.runtime.model import parameter_count
from bitassay.record.progress import Progress, silent


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = AUTO,
    revision: str | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
    memory: int | None = None,
    opened: bool = False,
    engine: str = TRANSFORMERS,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Load `model`: a catalogue name, a local folder, a local GGUF file or a Hugging Face id.

    Returns the transformers model in eval mode, without gradients, with `.tokenizer` and `.identity` set. A
    folder that `bitassay quantize` wrote comes back as `quantize` made it, with its `.quantization`: fake, or
    as codes where `packed`. attention: an implementation that transformers knows; "auto" is SDPA where the
    architecture has it, else what transformers chooses. revision: a branch, tag or commit of a Hugging Face
    id (`id@revision` says the same). opened: do not load its weights, but read each layer when it is needed
    (`models/opened.py`). memory: in bytes; a model whose weights take more is opened. engine: who runs it
    (`engines/hosted.py`); another than transformers computes on the CPU in its own types, and `evaluate`,
    `prove` and `calibrate` ask it. Raises BitassayError where the files are missing, truncated or not finite,
    MissingError where they cannot be fetched. Warns of files that look like weights and are none.
    """
    if engine != TRANSFORMERS:
        check_engine(engine, device=device, packed=packed, opened=opened)
    options = LoadOptions(as_dtype(dtype), as_device(device), as_attention(attention), trust_remote_code)
    source = resolve(model, progress, revision=revision)
    check_files(source.folder)
    if engine != TRANSFORMERS:
        return load_hosted(source, engine, options, progress)
    if packed and opened:
        raise BitassayError("a model that is opened holds no codes", "one of packed and opened")
    options = replace(options, opened=opened)
    if memory is not None and not opened:
        empty = without_weights(source, dtype=options.dtype, trust_remote_code=trust_remote_code)
        if not packed and parameter_count(empty) * options.dtype.itemsize > memory:
            options = replace(options, opened=True)
            progress(f"{source.name} is larger than the memory for it: each layer is read when it is needed")
    card = read_card(source.folder)
    if card is not None:
        return load_quantized(source, card, options, packed=packed, progress=progress)
    if packed:
        raise BitassayError(
            f"{source.folder}: holds no codes that `bitassay quantize` wrote",
            "bitassay.quantize(model, recipe='w4', packed=True)",
        )
    return load_checkpoint(source, options, progress)

"""Is a model whole? `check` reads all of it once and says what it is.

What can be wrong with a checkpoint without any error at load time: a digest that differs from the published
one, a forward pass that overflows. What `load` refuses by itself: truncated files, weights that are missing
or not finite, no tokenizer.
"""

from pathlib import Path
from typing import Any

import torch

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.config import text_config
from bitassay.models.identity import identity, tokenizer
from bitassay.models.options import AUTO
from bitassay.models.walk import decoder_layers, walk
from bitassay.models.weights import stored_bytes
from bitassay.record.progress import Progress, silent

PROBE = "The quick brown fox jumps over the lazy dog."


def check(
    model: str | Path, *, attention: str = AUTO, trust_remote_code: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Load `model` (as `load` does, in bfloat16), run it once, and return what it is, by property.

    `linears`, `experts` (fused parameters) and `routers` count matrices of the decoder layers; `parameters`
    counts tied weights once; the digests are those of `Identity`. Raises BitassayError where a file is
    damaged, a weight is missing or not finite, the tokenizer does not fit or the logits are not finite.
    """
    loaded = load(
        model,
        dtype=torch.bfloat16,
        attention=attention,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    name, source, config = identity(loaded).name, identity(loaded).source, text_config(loaded)
    progress(f"running {name} once")
    tokens = tokenizer(loaded)(PROBE, return_tensors="pt").input_ids
    largest = int(tokens.max()) if tokens.numel() else -1
    if not 0 <= largest < config.vocab_size:
        raise BitassayError(
            f"{source.folder}: the tokenizer gives tokens up to {largest}, "
            f"but the model knows {config.vocab_size}",
            "restore the tokenizer that came with the model",
        )
    with torch.inference_mode():
        logits = loaded(tokens).logits
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).sum())
        raise BitassayError(
            f"{source.folder}: {bad} of {logits.numel()} logits are NaN or infinite",
            "restore the checkpoint from its source",
        )
    progress(f"hashing the weights of {name}")
    known, matrices = identity(loaded), walk(loaded)
    return {
        "model": name,
        "origin": source.origin,
        "folder": str(source.folder),
        "architecture": type(loaded).__name__,
        "layers": len(decoder_layers(loaded)),
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "linears": len(matrices.linears),
        "experts": len(matrices.experts),
        "routers": len(matrices.routers),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "stored_bytes": stored_bytes(source.folder),
        "weights_sha256": known.weights_digest,
        "tokenizer_sha256": known.tokenizer_digest,
        "config_sha256": known.config_digest,
        "config_parts_sha256": known.configuration,
    }

"""Which checkpoints are causal language models, known from their configuration alone."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from bitassay.errors import BitassayError
from bitassay.models.transposed import as_linears

# What comes after a token changes what these say about it: CPM-Ant and XLNet see all of a text, XLM too,
# unless its configuration says otherwise, and the buckets of distances of ProphetNet depend on the length.
NOT_CAUSAL = ("cpmant", "prophetnet", "xlm", "xlnet")
REMEDY = "a decoder-only model, such as Llama, Qwen, Gemma, Mistral, GPT-2 or Mamba"


def check_causal(config: PretrainedConfig, folder: str | Path) -> None:
    """Raise BitassayError for an encoder-decoder, an encoder, and whatever else AutoModelForCausalLM does not
    load or would load as something that it is not."""
    kind = config.model_type
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    encoder = getattr(config, "is_decoder", None) is False and any(
        name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() for name in config.architectures or ()
    )
    if config.is_encoder_decoder:
        why = f"{kind} is an encoder-decoder"
    elif kind in NOT_CAUSAL:
        why = f"in {kind}, what is said about a token depends on what comes after it"
    elif encoder:
        why = f"{kind} is an encoder here (is_decoder is false), which sees what comes after a token"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code:
        why = f"transformers has no causal language model of type {kind}"
    else:
        return
    raise BitassayError(f"{folder}: {why}; only causal language models are read", REMEDY)


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration without its weights, as `load` arranges it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    as_linears(model)
    return model

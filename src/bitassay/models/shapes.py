"""A model without weights, from its configuration alone: for what can be told from names and shapes."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.source import Source


def without_weights(
    source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on the meta device. Raises BitassayError where transformers has no causal LM for the
    configuration."""
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        why = str(error).strip().partition("\n")[0]
        raise BitassayError(
            f"{source.folder}: transformers makes no causal LM of its config.json ({why:.200})",
            "a decoder-only model such as Llama, Qwen, Gemma or Mistral",
        ) from error

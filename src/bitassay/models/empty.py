"""A model without weights, from its configuration alone: for what can be told from names and shapes."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.config import read_config
from bitassay.models.source import Source
from bitassay.models.transposed import as_linears


def empty_model(
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the model of a configuration on the meta device, as `load` arranges it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    as_linears(model)
    return model


def without_weights(
    source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of a checkpoint on the meta device. Raises BitassayError where there is none."""
    config = read_config(source.folder, trust_remote_code=trust_remote_code)
    try:
        return empty_model(config, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a defect of config.json shows as whatever it happens to trip over
        why = str(error).strip().partition("\n")[0]
        raise BitassayError(
            f"{source.folder}: transformers makes no model of its config.json ({why:.200})",
            "download or save the checkpoint again",
        ) from error

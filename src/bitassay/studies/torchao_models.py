"""What torchao makes of a model: INT8 or FP8 weights and inputs, plain or by its SmoothQuant. A baseline.

Its documented steps: observers see calibration text, then every linear of the decoder layers becomes one with
a scale for each output row and dynamic ones for each token. SmoothQuant is a prototype there; it gives every
linear scales of its own, which are multiplied at run time, as our `places: [inputs]` does. torchao is the
extra `torchao`, imported here alone.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import MissingError
from bitassay.models.walk import decoder_layers, decoder_of
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.runtime.model import copy_sharing_parameters

ALPHA, SAMPLES = 0.5, 16  # SmoothQuant's own exponent; windows of calibration text, of 512 tokens


def require_torchao() -> None:
    """Raise MissingError that names the extra, where torchao is not installed."""
    if find_spec("torchao") is None:
        raise MissingError(
            "torchao is not installed", "pip install 'bitassay[torchao]', or `--only ours` without it"
        )


def torchao_model(base: PreTrainedModel, format: str, *, smoothed: bool) -> PreTrainedModel:
    """Return a copy of `base` with `format` ("int8" or "fp8") on both sides of its linears. Raises
    MissingError without torchao or a device that it supports."""
    require_torchao()
    api = import_module("torchao.quantization")
    model, config = copy_sharing_parameters(base), _config(api, format)
    layers = decoder_layers(model)
    try:
        if not smoothed:
            api.quantize_(layers, config)
            return model
        smoothing = import_module("torchao.prototype.smoothquant").SmoothQuantConfig
        options = {"base_config": config, "alpha": ALPHA, "use_running_absmax": True}
        api.quantize_(layers, smoothing(step="prepare", **options))
        _show(model, calibration_tokens(base, Calibration(samples=SAMPLES)))
        api.quantize_(layers, smoothing(step="convert", **options))
    except (AssertionError, NotImplementedError) as error:
        raise MissingError(f"torchao: {error}", "run it on another device") from error
    return model


def _config(api: Any, format: str) -> Any:
    row = api.PerRow()
    if format == "int8":
        return api.Int8DynamicActivationInt8WeightConfig(granularity=row, set_inductor_config=False)
    return api.Float8DynamicActivationFloat8WeightConfig(granularity=row, set_inductor_config=False)


@torch.no_grad()
def _show(model: PreTrainedModel, tokens: Tensor) -> None:
    for window in tokens:
        decoder_of(model)(input_ids=window[None].to(model.device), use_cache=False)

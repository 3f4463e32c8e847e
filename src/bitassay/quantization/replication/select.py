"""Which layers are worth a copy: the share of them that comes first by one of three measures.

error      ||W' - W||^2 / ||W||^2 over the layer's matrices, rounded to nearest by their schemes
kl         the mean divergence of the next-token distributions, in nats, when this layer alone is quantized
massive    the largest magnitude that the layer adds to any state: layers that put massive activations
           (2402.17762) into the stream stand out by orders of magnitude
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.models.hooks import hooked
from bitassay.models.precision import exact
from bitassay.models.walk import decoder_layers, decoder_of, matrices
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.replication import Chosen
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.sensitivity import divergences_over, matrix_locations
from bitassay.record.progress import Progress

KL_SAMPLES = 4


def chosen_layers(
    model: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    chosen: Chosen,
    tokens: Tokens | None,
    progress: Progress,
) -> list[int]:
    """Return the layers that need a copy most, in order. `tokens` may be None for `by: error`."""
    if chosen.by == "massive":
        assert tokens is not None
        scores = largest_additions(model, tokens)
    else:
        tensors = dict[str, QuantizedTensor]()
        for done, (name, view) in enumerate(views := matrices(model).items()):
            progress("rounding every matrix to choose layers", done, len(views))
            if scheme := schemes.get(name):
                tensors[name] = quantize_tensor(view, scheme, name)
        if chosen.by == "error":
            scores = weight_errors(model, tensors)
        else:
            assert tokens is not None
            scores = layer_divergences(model, tensors, tokens[:KL_SAMPLES], progress)
    ranked = sorted(scores, key=lambda layer: -scores[layer])
    return sorted(ranked[: chosen.count(len(decoder_layers(model)))])


def weight_errors(model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor]) -> dict[int, float]:
    """Return each layer's relative energy of rounding errors."""
    views, locations = matrices(model), matrix_locations(model)
    noise, signal = _zeros(model), _zeros(model)
    for name, tensor in tensors.items():
        weight, layer = exact(views[name]), locations[name].layer
        noise[layer] += (exact(tensor.dequantize()) - weight).square().sum().item()
        signal[layer] += weight.square().sum().item()
    return {layer: noise[layer] / signal[layer] if signal[layer] else 0.0 for layer in noise}


def layer_divergences(
    model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor], tokens: Tokens, progress: Progress
) -> dict[int, float]:
    """Return each layer's mean divergence when only it is quantized."""
    locations, groups = matrix_locations(model), dict[str, dict[str, QuantizedTensor]]()
    for name, tensor in tensors.items():
        groups.setdefault(str(locations[name].layer), {})[name] = tensor
    means = divergences_over(model, groups, tokens, "measuring the divergence of each layer", progress)
    return _zeros(model) | {int(layer): divergence for layer, divergence in means.items()}


@torch.no_grad()
def largest_additions(model: PreTrainedModel, tokens: Tokens) -> dict[int, float]:
    """Return the largest magnitude that each layer adds to a state."""
    scores = _zeros(model)

    def watch(layer: int):
        def note(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            scores[layer] = max(scores[layer], (states.float() - args[0].float()).abs().max().item())

        return note

    layers = enumerate(decoder_layers(model))
    with hooked(layer.register_forward_hook(watch(index)) for index, layer in layers):
        for sample in tokens:
            decoder_of(model)(input_ids=sample[None].to(model.device), use_cache=False)
    return scores


def _zeros(model: PreTrainedModel) -> dict[int, float]:
    return dict.fromkeys(range(len(decoder_layers(model))), 0.0)

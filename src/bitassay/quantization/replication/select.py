"""Which layers are worth a copy: the share of them that comes first by one of three measures.

error      ||W' - W||^2 / ||W||^2 over the layer's matrices, rounded to nearest by their schemes
kl         the mean divergence of the next-token distributions, in nats, when this layer alone is quantized
massive    the largest magnitude that the layer adds to any state: layers that put massive activations
           (2402.17762) into the stream stand out by orders of magnitude
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.models.hooks import hooked
from bitassay.models.walk import decoder_layers, decoder_of, matrices
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.replication import Chosen
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.sensitivity import divergences, places
from bitassay.record.progress import Progress

KL_SAMPLES = 4

Schemes = Mapping[str, WeightScheme | None]


def chosen_layers(
    model: PreTrainedModel,
    schemes: Schemes,
    chosen: Chosen,
    tokens: Int[Tensor, "samples tokens"] | None,
    progress: Progress,
) -> list[int]:
    """The layers that need it most, in order."""
    if chosen.by == "massive":
        assert tokens is not None
        scores = largest_additions(model, tokens)
    else:
        tensors = _rounded(model, schemes, progress)
        if chosen.by == "error":
            scores = weight_errors(model, tensors)
        else:
            assert tokens is not None
            scores = layer_divergences(model, tensors, tokens[:KL_SAMPLES], progress)
    ranked = sorted(scores, key=lambda layer: -scores[layer])
    return sorted(ranked[: chosen.count(len(decoder_layers(model)))])


def weight_errors(model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor]) -> dict[int, float]:
    """Each layer's relative energy of rounding errors."""
    views, where = matrices(model), places(model)
    noise, signal = dict.fromkeys(_layers(model), 0.0), dict.fromkeys(_layers(model), 0.0)
    for name, tensor in tensors.items():
        weight = views[name].double()
        noise[where[name].layer] += (tensor.dequantize().double() - weight).square().sum().item()
        signal[where[name].layer] += weight.square().sum().item()
    return {layer: noise[layer] / signal[layer] if signal[layer] else 0.0 for layer in noise}


def layer_divergences(
    model: PreTrainedModel,
    tensors: Mapping[str, QuantizedTensor],
    tokens: Int[Tensor, "samples tokens"],
    progress: Progress,
) -> dict[int, float]:
    """Each layer's mean divergence when only it is quantized."""
    where, scores = places(model), dict.fromkeys(_layers(model), 0.0)
    groups: dict[str, dict[str, QuantizedTensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(str(where[name].layer), {})[name] = tensor
    done = 0
    for window in tokens:
        for label, divergence in divergences(model, groups, window):
            scores[int(label)] += divergence / len(tokens)
            done += 1
            progress("measuring the divergence of each layer", done, len(groups) * len(tokens))
    return scores


@torch.no_grad()
def largest_additions(model: PreTrainedModel, tokens: Int[Tensor, "samples tokens"]) -> dict[int, float]:
    """The largest magnitude that each layer adds to a state."""
    scores = dict.fromkeys(_layers(model), 0.0)

    def watch(layer: int):
        def note(_module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            scores[layer] = max(scores[layer], (states.float() - given[0].float()).abs().max().item())

        return note

    layers = enumerate(decoder_layers(model))
    with hooked(layer.register_forward_hook(watch(index)) for index, layer in layers):
        for sample in tokens:
            decoder_of(model)(input_ids=sample[None].to(model.device), use_cache=False)
    return scores


def _layers(model: PreTrainedModel) -> range:
    return range(len(decoder_layers(model)))


def _rounded(model: PreTrainedModel, schemes: Schemes, progress: Progress) -> dict[str, QuantizedTensor]:
    views, found = matrices(model), {}
    for name, view in views.items():
        progress("rounding every matrix to choose layers", len(found), len(views))
        if scheme := schemes.get(name):
            found[name] = quantize_tensor(view, scheme, name)
    return found

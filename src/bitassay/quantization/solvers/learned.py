"""Learned rounding: a layer's codes and scales, moved until its output is that of the unquantized layer.

Rounding to nearest minimises the error of each weight, GPTQ that of each matrix's output; here it is the
output of a whole decoder layer, for the inputs that the quantized layers before it give,

    L = 1/2 mean_t |e_t|^2 / |y_t|^2  +  1/2 sum_t |e_t|^2 / sum_t |y_t|^2

over tokens t, where y = layer(x) and e = layer'(x') - y. The first token of a text has states that are
hundreds of times larger than all others', and these look at it (massive activations, 2402.17762): in the
second term alone it would drown them, in the first alone nothing would hold it. Gradients are straight
through (`latent.py`), the optimizer is Adam. AutoRound (2309.05516) learns with signed gradients and rounding
offsets of at most half a step; latents may go further, and start where GPTQ left them off. Learning all of a
layer's weights so is the first phase of EfficientQAT (2407.11062). Products are in bf16.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitassay.quantization.recipe.solvers import Learned
from bitassay.quantization.solvers.latent import LatentWeight, latent_linears
from bitassay.quantization.solvers.layerwise import Arguments, Hidden
from bitassay.quantization.solvers.schedule import learning_rate, sample_order


def relative_error(output: Hidden, target: Hidden) -> Float[Tensor, ""]:
    """The squared error beside the square of what should be: half by token, half of all tokens together."""
    wanted, least = target.float(), torch.finfo(torch.float32).eps ** 2
    error, size = (output.float() - wanted).square().sum(-1), wanted.square().sum(-1)
    by_token = (error / size.clamp(min=least)).mean()
    return (by_token + error.sum() / size.sum().clamp(min=least)) / 2


def learn_layer(
    layer: nn.Module,
    latents: Mapping[str, LatentWeight],
    hidden: Hidden,
    targets: Hidden,
    arguments: Arguments,
    spec: Learned,
) -> list[float]:
    """Learn the latents of a layer's linears (by their names within it) in place; the loss of every step."""
    codes = [latent.u for latent in latents.values()]
    grids = [parameter for latent in latents.values() for parameter in latent.grid_parameters()]
    kinds = [(parameters, rate) for parameters, rate in ((codes, spec.codes), (grids, spec.scales)) if rate]
    groups = [{"params": parameters, "lr": rate, "rate": rate} for parameters, rate in kinds]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    order = sample_order(len(hidden), spec.steps * spec.batch, spec.seed)
    losses = []
    with latent_linears(layer, latents), torch.enable_grad():
        for step in range(spec.steps):
            chosen = order[step * spec.batch : (step + 1) * spec.batch]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(step, spec.steps, spec.warmup)
            with torch.autocast(hidden.device.type, torch.bfloat16):
                output = arguments.call(layer, hidden[chosen], chosen)
            loss = relative_error(output, targets[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for latent in latents.values():
                latent.clamp()
            losses.append(loss.item())
    return losses

"""Learned rounding: a layer's codes and scales, moved until its output is that of the unquantized layer.

Rounding to nearest minimises the error of each weight, GPTQ that of each matrix's output; here it is the
output of a whole decoder layer, for the inputs that the quantized layers before it give,

    L = 1/2 mean_t |e_t|^2 / |y_t|^2  +  1/2 sum_t |e_t|^2 / sum_t |y_t|^2

over tokens t, where y = layer(x) and e = layer'(x') - y. The first token of a text has states that are
hundreds of times larger than all others', and these look at it (massive activations, 2402.17762): in the
second term alone it would drown them, in the first alone nothing would hold it. Gradients are straight
through (`shadow_weight.py`). AutoRound (2309.05516) learns with signed gradients and rounding offsets of at
most half a step; here weights may go further, and start where GPTQ left them. Learning all of a layer's
weights so is the first phase of EfficientQAT (2407.11062). Products are in bf16 where that is faster.

Adam moves all weights equally far, however little there is to gain: few steps, or codes that are nearly exact
already, can end worse than they began. Such a layer keeps what it had.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitassay.models.precision import short_products
from bitassay.quantization.recipe.solvers import Learned
from bitassay.quantization.solvers.descent import descend
from bitassay.quantization.solvers.layerwise import Hidden
from bitassay.quantization.solvers.shadow_weight import shadow_linears
from bitassay.quantization.solvers.solver import Layer, Solution

COMPARED_SAMPLES = 32  # on which a layer is compared with what it was


def relative_error(output: Hidden, target: Hidden) -> Float[Tensor, ""]:
    """Return the squared error relative to the square of the target: half by token, half of all tokens."""
    wanted, least = target.float(), torch.finfo(torch.float32).eps ** 2
    error, size = (output.float() - wanted).square().sum(-1), wanted.square().sum(-1)
    by_token = (error / size.clamp(min=least)).mean()
    return (by_token + error.sum() / size.sum().clamp(min=least)) / 2


def solve_layer(spec: Learned, layer: Layer) -> dict[str, Solution]:
    """Return what learning makes of a layer's linears, by their names within it; where it makes the layer no
    better, what they were."""
    shadows = {name: solution.shadow_weight() for name, solution in layer.linears.items()}
    codes = [shadow.u for shadow in shadows.values()]
    grids = [parameter for shadow in shadows.values() for parameter in shadow.grid_parameters()]

    short = short_products(layer.hidden.device, layer.hidden.dtype)

    def loss_of(chosen: Int[Tensor, " chosen"]) -> Float[Tensor, ""]:
        here = chosen.to(layer.hidden.device)
        with torch.autocast(layer.hidden.device.type, torch.bfloat16, enabled=short):
            output = layer.arguments.call(layer.module, layer.hidden[here], chosen)
        return relative_error(output, layer.targets[here])

    def backward(chosen: Int[Tensor, " chosen"]) -> float:
        loss = loss_of(chosen)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def error() -> float:
        batches = torch.arange(min(COMPARED_SAMPLES, len(layer.hidden))).split(spec.batch)
        return sum(loss_of(chosen).item() * len(chosen) for chosen in batches) / sum(map(len, batches))

    kinds = [(codes, spec.codes), (grids, spec.scales)]
    with shadow_linears(layer.module, shadows):
        before = error()
        with torch.enable_grad():
            for _ in descend(kinds, list(shadows.values()), len(layer.hidden), spec, backward):
                pass
        after = error()
    if not after < before:
        layer.progress(f"{layer.name}: error {before:.3g}; learning made it {after:.3g} and was undone")
        return dict(layer.linears)
    layer.progress(f"{layer.name}: error {before:.3g} -> {after:.3g}")
    return {name: Solution(shadow.quantized(), shadow.weight()) for name, shadow in shadows.items()}

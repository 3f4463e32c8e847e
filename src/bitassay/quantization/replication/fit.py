"""Coefficients of passes by least squares.
What a layer with copies should put out is what the unquantized layer puts out in the unquantized model.

    serial     pass by pass:  min over a, c of  sum_t w_t |y_t - a x_t - c f(x)_t|^2
    parallel   together:      min over a, c_i of  sum_t w_t |y_t - a x_t - sum_i c_i f_i(x)_t|^2

over the tokens t of calibration text, x being what enters the layer in the quantized model so far, and y the
unquantized model's own state behind the layer. "No further pass" (a = 1, c = 0) is one of the choices of each
serial pass, and the layer as it is one of the first, so no pass makes the error on this text larger. The
weights

    w_t = 1/2 / (T |y_t|^2)  +  1/2 / sum_t |y_t|^2

count massive activations and the other tokens half each, as `solvers/learned.py` does. Sums are in fp64.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.models.precision import exact
from bitassay.models.walk import decoder_layers
from bitassay.quantization.recipe.replication import Steps
from bitassay.quantization.runtime.looped_layers import LoopedForward, step
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.layerwise import Hidden, first_inputs, run_layer
from bitassay.record.progress import Progress


@torch.no_grad()
def fit_passes(
    model: PreTrainedModel, reference: PreTrainedModel, tokens: Tokens, progress: Progress
) -> dict[int, Steps]:
    """Fit the coefficients of each layer of `model` that has passes, front to back, so that each is fitted to
    what really enters it, and return them. `reference` is the same model unquantized."""
    layers, references, fitted = decoder_layers(model), decoder_layers(reference), {}
    hidden, arguments = first_inputs(model, tokens)
    wanted, plain = first_inputs(reference, tokens)
    for index, layer in enumerate(layers):
        progress("fitting the coefficients of copies", index, len(layers))
        wanted = run_layer(references[index], wanted, plain[index])
        if isinstance(passes := layer.forward, LoopedForward):

            def run(number: int, x: Hidden, passes: LoopedForward = passes, index: int = index) -> Hidden:
                [forward] = passes.forwards[number]
                return run_layer(forward, x, arguments[index])

            count = range(passes.steps.count)
            if passes.how == "parallel":
                passes.steps = fit_parallel(hidden, [run(number, hidden) for number in count], wanted)
            else:
                passes.steps = fit_serial(hidden, [lambda x, n=n, run=run: run(n, x) for n in count], wanted)
            fitted[index] = passes.steps
        hidden = run_layer(layer, hidden, arguments[index])
    progress("fitting the coefficients of copies", len(layers), len(layers))
    return fitted


def fit_serial(x: Hidden, passes: Sequence, wanted: Hidden) -> Steps:
    """Return the best keep and add of each pass in turn."""
    keep, add = [], []
    for run in passes:
        y = run(x)
        a, c = least_squares([x, y - x], wanted)
        x = step(x, y, a, c)
        keep.append(a)
        add.append(c)
    return Steps(tuple(keep), tuple(add))


def fit_parallel(x: Hidden, outputs: Sequence[Hidden], wanted: Hidden) -> Steps:
    """Return the best keep, and the best add of every copy beside the others."""
    a, *add = least_squares([x, *(y - x for y in outputs)], wanted)
    return Steps((a,) + (1.0,) * (len(add) - 1), tuple(add))


def least_squares(parts: Sequence[Hidden], wanted: Hidden) -> list[float]:
    """Return the coefficients of the sum of `parts` that is nearest to `wanted`; of several, the smallest."""
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    right = torch.zeros(len(parts), dtype=torch.float64)
    weights = token_weights(wanted)
    for place, target in enumerate(wanted):  # a sample at a time, in fp64
        rows = torch.stack([exact(part[place]) for part in parts])
        weighed = rows * weights[place][:, None]
        gram += torch.einsum("itd,jtd->ij", weighed, rows).cpu()
        right += torch.einsum("itd,td->i", weighed, exact(target)).cpu()
    return torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0].tolist()


def token_weights(wanted: Hidden) -> Float[Tensor, "samples tokens"]:
    """Return the weight of each token's squared error, in fp64."""
    size = exact(wanted).square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    return (1 / (size.numel() * size) + 1 / size.sum()) / 2

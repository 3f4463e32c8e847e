"""How much a model minds that one of its matrices, or one of its layers, is quantized.

    output error   ||x (W' - W)^T||^2 / ||x W^T||^2: the energy of what rounding adds to the matrix's own
                   output, relative to that output
    predicted KL   1/2 sum_t (g_t . (W' - W) x_t)^2, the mean over tokens; g_t is the gradient of
                   sum log p(y) at the matrix's output for token t, with each y drawn from the model's own
                   prediction: the output error seen through the Fisher information, which is the second
                   derivative of the divergence. Products of different tokens' terms are left out
    KL             sum_v p_v (log p_v - log q_v), the mean over tokens of the divergence of the next-token
                   distributions when only these matrices are quantized; it costs a run of all layers from
                   the first changed one to the head

The first two take one pass over the text for all matrices and any number of candidates. Output errors of
different matrices do not compare: on stories260k, bits spent by them did worse than bits spent evenly, and
bits spent by predicted divergences about as well as by measured ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.models.hooks import hooked, reading
from bitassay.models.precision import widest
from bitassay.models.walk import decoder_layers, decoder_of, matrices, module_name, walk
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.experts import Load, expert_inputs, expert_products
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.quantization.shapes import Tokens
from bitassay.record.progress import Progress

NOTHING_ELSE = Recipe.model_validate({"name": "one-group", "weights": None})
ROWS = 64  # tokens whose distributions exist at a time


class Location(NamedTuple):
    """The number of a matrix's layer, and its name there, which all slices of one parameter share."""

    layer: int
    kind: str


def matrix_locations(model: PreTrainedModel) -> dict[str, Location]:
    """Return the location of each of `matrices(model)`."""
    prefix, linears = module_name(model, decoder_layers(model)), walk(model).linears
    locations = {}
    for name in matrices(model):
        layer, _, kind = name.removeprefix(f"{prefix}.").partition(".")
        locations[name] = Location(int(layer), kind if name in linears else kind.rpartition(".")[0])
    return locations


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    tokens: Tokens,
    tap: Callable[[str, Float[Tensor, "rows _"]], None],
    progress: Callable[[int], None] = lambda done: None,
) -> Load:
    """Run the text, a sample at a time, and show the inputs of every matrix by its name. Returns how many
    tokens each expert got; `progress` gets the number of finished samples."""

    shows = reading(walk(model).linears, lambda name, x: tap(name, x.reshape(-1, x.shape[-1])))
    with hooked(shows), expert_inputs(model, tap) as load:
        for done, sample in enumerate(tokens):
            decoder_of(model)(input_ids=sample[None].to(model.device), use_cache=False)
            progress(done + 1)
    return load


class OutputError:
    """The energy of matrices' outputs, and of what each candidate adds to them: a tap for `observe`."""

    def __init__(self, model: PreTrainedModel, candidates: Mapping[str, Sequence[QuantizedTensor]]):
        self.weights, self.candidates = matrices(model), candidates
        self.signal = dict.fromkeys(candidates, 0.0)
        self.noise = {name: [0.0] * len(tensors) for name, tensors in candidates.items()}
        self.rows = dict.fromkeys(candidates, 0)

    def __call__(self, name: str, x: Float[Tensor, "rows in"]) -> None:
        if name not in self.candidates:
            return
        x, weight = x.float(), self.weights[name].float()
        self.rows[name] += len(x)
        self.signal[name] += _energy(x @ weight.T)
        for place, tensor in enumerate(self.candidates[name]):
            self.noise[name][place] += _energy(x @ (tensor.dequantize() - weight).T)

    def relative(self, name: str) -> list[float] | None:
        """Return each candidate's relative energy; None where no input came, or nothing but zeros."""
        if self.signal[name] == 0:
            return None
        return [noise / self.signal[name] for noise in self.noise[name]]


def _energy(y: Tensor) -> float:
    return y.square().sum(dtype=widest(y.device)).item()


def predicted_divergences(
    model: PreTrainedModel,
    candidates: Mapping[str, Sequence[QuantizedTensor]],
    tokens: Tokens,
    progress: Callable[[int], None] = lambda done: None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the predicted KL divergence of each candidate of each matrix, in nats a token."""
    weights, generator = matrices(model), torch.Generator().manual_seed(seed)
    total = {name: [0.0] * len(tensors) for name, tensors in candidates.items()}
    for done, sample in enumerate(tokens):
        with torch.enable_grad(), _kept_products(model) as kept:
            log_p = model(sample[None].to(model.device), use_cache=False).logits[0].float().log_softmax(1)
            drawn = log_p.detach().exp().cpu().multinomial(1, generator=generator)  # alike on every device
            log_p.gather(1, drawn.to(log_p.device)).sum().backward()
        for name, x, y in kept:
            if name not in candidates or y.grad is None:
                continue
            g, x = y.grad.reshape(-1, y.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
            for place, tensor in enumerate(candidates[name]):
                change = x @ (tensor.dequantize() - weights[name].float()).T
                total[name][place] += _energy((g * change).sum(1)) / 2 / tokens.numel()
        progress(done + 1)
    return total


@contextmanager
def _kept_products(model: PreTrainedModel) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Yield every matrix's name, input and output (which gets a gradient) of the forward passes meanwhile."""
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str, x: Tensor, y: Tensor) -> Tensor:
        y.retain_grad()
        kept.append((name, x.detach(), y))
        return y

    def after(name: str) -> Callable[..., Tensor]:
        return lambda _, arguments, y: keep(name, arguments[0], y)

    linears, embeddings = walk(model).linears.items(), model.get_input_embeddings()
    with (
        hooked(module.register_forward_hook(after(name)) for name, module in linears),
        # Parameters need no gradients; everything after the embeddings does.
        hooked([embeddings.register_forward_hook(lambda _, arguments, y: y.detach().requires_grad_())]),
        expert_products(model, lambda name, x, plain: keep(name, x, plain())),
    ):
        yield kept


def divergences_over(
    model: PreTrainedModel,
    groups: Mapping[str, Mapping[str, QuantizedTensor]],
    tokens: Tokens,
    what: str,
    progress: Progress,
) -> dict[str, float]:
    """Return the mean divergence over all windows of each group of matrices when only it is quantized."""
    means, done = dict.fromkeys(groups, 0.0), 0
    for window in tokens:
        for label, divergence in divergences(model, groups, window):
            means[label] += divergence / len(tokens)
            done += 1
            progress(what, done, len(groups) * len(tokens))
    return means


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    groups: Mapping[str, Mapping[str, QuantizedTensor]],
    window: Int[Tensor, " tokens"],
) -> Iterator[tuple[str, float]]:
    """Yield the mean KL divergence over a window for each group of matrices that alone is quantized."""
    entering: dict[int, Tensor] = {}
    further: dict[int, tuple[Any, ...] | None] = {}  # what a layer puts out with its states

    def keep(index: int) -> Callable[..., None]:
        def kept(_module: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> None:
            entering[index] = args[0] if args else options["hidden_states"]
            further[index] = output[1:] if isinstance(output, tuple) else None

        return kept

    def pass_on(hidden: Tensor, rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        return lambda *_, **__: hidden if rest is None else (hidden, *rest)

    layers = decoder_layers(model)
    with hooked(m.register_forward_hook(keep(i), with_kwargs=True) for i, m in enumerate(layers)):
        wanted = _logits(model, window)
    locations = matrix_locations(model)
    # Where layers hand keys on to others, none can be left out.
    all_run = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0) > 0
    for label, tensors in groups.items():
        changed = with_tensors(model, Quantization(NOTHING_ELSE, dict(tensors)))
        first = 0 if all_run else min((locations[name].layer for name in tensors), default=0)
        for index, layer in enumerate(decoder_layers(changed)[:first]):
            layer.forward = pass_on(entering[first], further[index])
        yield label, mean_divergence(wanted, _logits(changed, window))


def _logits(model: PreTrainedModel, window: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens vocabulary"]:
    return model(window[None].to(model.device), use_cache=False).logits[0]


def mean_divergence(
    base: Float[Tensor, "tokens vocabulary"], other: Float[Tensor, "tokens vocabulary"]
) -> float:
    """Return the mean of KL(base || other) over tokens, in nats, without what fp32 leaves below zero."""
    total = 0.0
    for rows, other_rows in zip(base.split(ROWS), other.split(ROWS), strict=True):
        log_p, log_q = rows.float().log_softmax(1), other_rows.float().log_softmax(1)
        total += (log_p.exp() * (log_p - log_q)).sum(1).clamp(min=0).sum(dtype=widest(base.device)).item()
    return total / len(base)

"""Could decoder layers share their weights, stored once for several of them? An answer in two parts.

`weights`: how much alike the same matrix of different layers is. With R the correlations (cosines) of that
matrix between all n layers, what coding them together can save, however it is done, is at small error

    bits a weight = -log2(det R) / (2 n)

of Gaussian weights (the rate-distortion function). The hidden neurons of an MLP have no order of their own:
`matched` is the correlation of neighbouring layers once each neuron has been given the partner it is
most like, `chance` that of the same matching where the columns of one were shuffled.

`models`: pairs of layers share the one matrix, times a coefficient each, that is nearest to both (the first
singular vector of the two), at full precision; norms stay their own. One pair at a time, then all pairs. Such
a model at 2 b bits stores what plain b bits do, so plain GPTQ at 2 bits (16 samples of C4) is what it would
have to beat even before it is quantized itself. KL in nats a token and perplexity on WikiText-2, intervals of
95 % over windows, `kl_less_w2` paired.

Run: python benchmarks/sharing.py [--model smollm2-135m] [--windows 16] [--window 512] > sharing.json
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import score_windows, summarise, text_difference
from bitassay.models.walk import decoder_layers, module_name, walk
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.runtime.model import copy_sharing_parameters
from bitassay.record.environment import environment

MLP = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}  # by kind: which dimension has the neurons
W2 = Recipe.model_validate(
    {
        "name": "w2",
        "weights": {"format": "int2", "granularity": "g64", "symmetric": False, "scale": "mse"},
        "gptq": {},
        "calibration": {"samples": 16},
    }
)
Kinds = dict[str, list[Tensor]]


def by_kind(model: PreTrainedModel) -> Kinds:
    """The matrices of each kind, front to back."""
    prefix, found = module_name(model, decoder_layers(model)) + ".", Kinds()
    for name, linear in walk(model).linears.items():
        found.setdefault(name.removeprefix(prefix).partition(".")[2], []).append(linear.weight.detach())
    return found


def correlations(rows: Float[Tensor, "n weights"]) -> Float[Tensor, "n n"]:
    unit = nn.functional.normalize(rows.double(), dim=1)
    return unit @ unit.T


def alike(kinds: Kinds) -> Iterable[dict[str, object]]:
    """A row for each kind."""
    for kind, matrices in kinds.items():
        found = correlations(torch.stack([matrix.flatten() for matrix in matrices]))
        n, apart = len(found), (found - torch.eye(len(found))).abs()
        yield {
            "kind": kind,
            "neighbours_mean": found.diagonal(1).mean().item(),
            "any_two_layers_at_most": apart.max().item(),
            "bits_to_save": -torch.linalg.slogdet(found).logabsdet.item() / math.log(2) / (2 * n),
        }


def neurons(kinds: Kinds, layer: int) -> Float[Tensor, "neurons weights"]:
    """All weights of each hidden neuron of a layer's MLP."""
    parts = [kinds[kind][layer] if dim == 0 else kinds[kind][layer].T for kind, dim in MLP.items()]
    return nn.functional.normalize(torch.cat(parts, dim=1).double(), dim=1)


def matched(kinds: Kinds) -> dict[str, float]:
    """Mean correlation of matched neurons of neighbouring layers, and what chance would give."""
    found: dict[str, list[float]] = {"matched": [], "chance": []}
    for layer in range(len(kinds["mlp.up_proj"]) - 1):
        first, second = neurons(kinds, layer), neurons(kinds, layer + 1)
        order = torch.randperm(second.shape[1], generator=torch.Generator().manual_seed(layer))
        for name, other in (("matched", second), ("chance", second[:, order])):
            cosines = first @ other.T
            rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
            found[name].append(cosines[rows, columns].mean().item())
    return {name: sum(values) / len(values) for name, values in found.items()}


def nearest_to_both(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples of one matrix that are nearest to the two, in squared error."""
    both = torch.stack([first.flatten(), second.flatten()]).double()
    vectors = torch.linalg.eigh(both @ both.T).eigenvectors[:, -1]
    shared = vectors @ both
    return tuple((c * shared).view_as(first).to(first.dtype) for c in vectors)  # type: ignore[return-value]


def with_shared(base: PreTrainedModel, pairs: Iterable[int]) -> PreTrainedModel:
    """Layers i and i + 1 of each pair i share their matrices."""
    model = copy_sharing_parameters(base)
    layers = decoder_layers(model)
    for index in pairs:
        for kind in by_kind(base):
            here, there = (layers[place].get_submodule(kind) for place in (index, index + 1))
            weights = nearest_to_both(here.get_parameter("weight"), there.get_parameter("weight"))
            for linear, weight in zip((here, there), weights, strict=True):
                linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return model


def models(base: PreTrainedModel, protocol: Protocol) -> Mapping[str, object]:
    windows, source = token_windows(base.tokenizer, protocol)  # type: ignore[arg-type]
    count = len(decoder_layers(base))
    made = {"w2": quantize_cached(base, W2), "all pairs": with_shared(base, range(0, count - 1, 2))}
    made |= {f"layers {i} and {i + 1}": with_shared(base, [i]) for i in range(0, count - 1, 2)}
    text: dict[str, list[TokenScores]] = {name: [] for name in (BASE, *made)}
    for place, found in score_windows(base, made, windows):
        print(f"window {place}", file=sys.stderr, flush=True)
        for name, scores in found.items():
            text[name].append(scores)
    rows = []
    for name in made:
        quality = summarise(text[name], text[BASE])
        apart = text_difference(text["w2"], text[name])
        rows.append(
            {
                "model": name,
                "kl": quality.kl_mean,
                "kl_ci": quality.kl_ci,
                "ppl_delta": quality.ppl_delta,
                "ppl_delta_ci": quality.ppl_delta_ci,
                "kl_less_w2": None if name == "w2" else apart.kl,
                "kl_less_w2_ci": None if name == "w2" else apart.kl_ci,
            }
        )
    return {"protocol": protocol.id, "corpus": source, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    given = parser.parse_args()
    base = bitassay.load(given.model)
    kinds = by_kind(base)
    run = {
        "model": given.model,
        "weights": list(alike(kinds)),
        "neurons": matched(kinds) if MLP.keys() <= kinds.keys() else None,
        "models": models(base, Protocol(window_tokens=given.window, windows=given.windows)),
        "environment": environment(),
    }
    print(json.dumps(run, indent=1))


if __name__ == "__main__":
    main()

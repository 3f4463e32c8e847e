"""W8A8 with and without SmoothQuant: on a model as it is, on the same model with planted outliers, and one
layer beside torchao.

    models      MODEL, and MODEL with CHANNELS channels of every normed state multiplied by FACTOR: the norm's
                gains are multiplied and the columns that read them divided, which changes nothing in fp32
    quantized   every linear of the decoder layers: int8 weights, a scale each row; inputs int8, a scale each
                token. `outliers`: columns beyond 6 standard deviations stay in 16 bits instead
    calibration SAMPLES windows of 512 tokens of C4
    evaluation  WINDOWS windows of 512 tokens of WikiText-2's raw test set, KL in nats a token against the
                model in fp32; `pairs` are differences of mean KL with a bootstrap interval over windows

With torchao importable (pip install --no-deps --target DIR torchao==0.18.0; PYTHONPATH=DIR) one layer is
smoothed and quantized by both: scales, weights and outputs are compared, each against the exact product.
Run: python benchmarks/smoothquant.py [--model smollm2-135m] [--windows 8] [--samples 8] [--channels 6]
[--factor 50] > smoothquant.json
"""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import score_windows, summarise
from bitassay.evaluation.statistics import log_difference_interval, mean_of
from bitassay.models.walk import walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.inputs.ranges import Ranges, collect_ranges, input_roundings
from bitassay.quantization.pipeline import quantize_tensors
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.inputs import Activations, OutlierColumns
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.recipe.transforms import Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import copy_sharing_parameters, with_tensors
from bitassay.quantization.transforms.folding import find_folds
from bitassay.quantization.transforms.residual_stream import Weight
from bitassay.quantization.transforms.smoothing import smooth, smoothquant_scales
from bitassay.record.environment import environment

LAYER = "model.layers.{}.mlp.gate_proj"
W8 = WeightScheme(format="int8", scale_dtype="float32")


def planted(model: PreTrainedModel, channels: int, factor: float) -> PreTrainedModel:
    """The same function, with the same channels large wherever linears read a norm."""
    copy = copy_sharing_parameters(model)
    width = model.config.hidden_size
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:channels]
    scale = torch.ones(width, dtype=torch.float64)
    scale[chosen] = factor
    for where in find_folds(copy, ("norms",))[0]:
        assert where.norm is not None
        Weight(where.norm.module, "weight").write(where.norm.gain() * scale - where.norm.offset)
        for name in where.readers:
            weight = Weight(copy.get_submodule(name), "weight")
            weight.write(weight.read() / scale)
    return copy


def candidates(model: PreTrainedModel, ranges: dict[str, Ranges]) -> dict[str, PreTrainedModel]:
    """What a recipe with the same parts would make, the calibration text being read once for all."""

    def quantized(of: PreTrainedModel, spec: Activations | None = None) -> PreTrainedModel:
        made = quantize_tensors(of, Recipe(name="w8", weights=W8))
        return with_tensors(of, replace(made, inputs=input_roundings(of, spec, ranges) if spec else {}))

    def smoothed(alpha: float) -> PreTrainedModel:
        draft = copy_sharing_parameters(model)
        smooth(draft, Smoothing(method="smoothquant", alpha=alpha), ranges, lambda _: W8)
        return draft

    return {
        "w8": quantized(model),
        "w8a8": quantized(model, Activations()),
        "w8a8-smoothquant-0.5": quantized(smoothed(0.5), Activations()),
        "w8a8-smoothquant-0.8": quantized(smoothed(0.8), Activations()),
        "w8a8-outliers": quantized(model, Activations(outliers=OutlierColumns(sigma=6))),
    }


def measure(
    label: str, model: PreTrainedModel, base: PreTrainedModel, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a candidate, and the differences to w8a8; KL is against `base`, whose function `model` has."""
    tokens = calibration_tokens(base, Calibration(samples=arguments.samples, tokens=512))
    made = candidates(model, collect_ranges(model, tokens))
    windows, _ = token_windows(base.tokenizer, Protocol(window_tokens=512, windows=arguments.windows))
    scores: dict[str, list[TokenScores]] = {BASE: [], **{name: [] for name in made}}
    for index, found in score_windows(base, made, windows):
        print(f"{label}: window {index + 1} of {len(windows)}", file=sys.stderr)
        for name, score in found.items():
            scores[name].append(score)
    base_scores = scores.pop(BASE)
    rows = []
    for name, found in scores.items():
        quality = summarise(found, base_scores)
        rows.append(
            {"model": label, "candidate": name, "kl_mean": quality.kl_mean, "kl_ci": quality.kl_ci}
            | {"ppl": quality.ppl, "top1_agreement": quality.top1_agreement}
        )
    kl = {name: mean_of([w.kl.double().mean().item() for w in found]) for name, found in scores.items()}
    pairs = []
    for name in ("w8a8-smoothquant-0.5", "w8a8-smoothquant-0.8", "w8a8-outliers"):
        interval = log_difference_interval(kl["w8a8"], kl[name])
        pairs.append(
            {"model": label, "pair": f"{name} - w8a8"}
            | {"kl_difference": kl[name].value - kl["w8a8"].value, "ci": interval}
        )
    return rows, pairs


def beside_torchao(model: PreTrainedModel, samples: int) -> dict[str, Any] | None:
    """One layer, smoothed and quantized by both on the same inputs; None where torchao is not there."""
    try:
        torchao = importlib.import_module("torchao")
    except ImportError:
        return None
    api = importlib.import_module("torchao.quantization")
    prototype = importlib.import_module("torchao.prototype.smoothquant")
    name = LAYER.format(model.config.num_hidden_layers // 2)
    linear = walk(model).linears[name]
    inputs: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, given: inputs.append(given[0][0]))
    tokens = calibration_tokens(model, Calibration(samples=samples, tokens=512))
    ranges = collect_ranges(model, tokens, names=[name])[name]
    handle.remove()
    held_out = inputs[-1]

    # torchao, by its documented steps
    theirs = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    theirs[0].weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    config = api.Int8DynamicActivationInt8WeightConfig(version=2)
    step = prototype.SmoothQuantConfig
    api.quantize_(theirs, step(base_config=config, step="prepare", alpha=0.5))
    with torch.no_grad():
        for batch in inputs:
            theirs(batch)
    api.quantize_(theirs, step(base_config=config, step="convert", alpha=0.5))
    their_scales = 1 / theirs[0].weight.act_pre_scale

    our_scales = smoothquant_scales(ranges.absmax, linear.weight.abs().amax(0), 0.5)
    weight = quantize_tensor(linear.weight * our_scales, W8)
    with torch.no_grad():
        exact = held_out @ linear.weight.T
        ours = rounded_inputs(held_out / our_scales, InputRounding("int8")) @ weight.dequantize().T
        plain = (
            rounded_inputs(held_out, InputRounding("int8"))
            @ quantize_tensor(linear.weight, W8).dequantize().T
        )
        their_output = theirs(held_out)
        # torchao's step is the largest magnitude over 127.5, not 127. With it both agree, but for that
        # largest number itself, which is a tie then.
        as_theirs = _rounded(held_out / our_scales, 127.5) @ _rounded(linear.weight * our_scales, 127.5).T

    def relative(y: Tensor, to: Tensor) -> float:
        return ((y - to).norm() / to.norm()).item()

    return {
        "torchao": torchao.__version__,
        "layer": name,
        "scales_largest_relative_difference": (our_scales / their_scales - 1).abs().max().item(),
        "step_over_theirs": (weight.scale / theirs[0].weight.scale).mean().item(),
        "codes_that_differ": (weight.codes() != theirs[0].weight.qdata.float()).float().mean().item(),
        "our_output_error": relative(ours, exact),
        "their_output_error": relative(their_output, exact),
        "outputs_differ_by": relative(ours, their_output),
        "outputs_differ_by_on_their_step": relative(as_theirs, their_output),
        "output_error_without_smoothing": relative(plain, exact),
    }


def _rounded(rows: Tensor, levels: float) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / levels
    return (rows / scale).round().clamp(-128, 127) * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--factor", type=float, default=50.0)
    arguments = parser.parse_args()
    base = bitassay.load(arguments.model)
    with_outliers = planted(base, arguments.channels, arguments.factor)
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        before, after = (m(ids).logits for m in (base, with_outliers))
    rows, pairs = measure(arguments.model, base, base, arguments)
    label = f"{arguments.model}, {arguments.channels} channels times {arguments.factor:g}"
    more_rows, more_pairs = measure(label, with_outliers, base, arguments)
    report = {
        "planting_changes_logits_by": ((after - before).norm() / before.norm()).item(),
        "rows": rows + more_rows,
        "pairs": pairs + more_pairs,
        "one_layer": beside_torchao(base, arguments.samples),
        "protocol": vars(arguments),
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

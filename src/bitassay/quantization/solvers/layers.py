"""One decoder layer after the other: every matrix quantized for the inputs that will reach it.

A matrix is solved at the moment when its input arrives (`layerwise.py`): rounded to nearest or by GPTQ, with
low-rank factors where the recipe wants them. Where it wants the layer's own output learned, that follows. A
finished layer is written to the work folder, and read from there the next time.
"""

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantization.codes.adaptive import adapted
from bitassay.quantization.codes.copies import digit_planes, merged, planes
from bitassay.quantization.codes.quantize import check_weight, quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.experts import expert_inputs, expert_matrix, warn_of_few
from bitassay.quantization.solvers.gptq import Rounded, gptq, gptq_binary
from bitassay.quantization.solvers.latent import LatentWeight
from bitassay.quantization.solvers.layerwise import (
    Arguments,
    Hidden,
    first_inputs,
    hessian_of,
    input_groups,
    products_in,
    quantize_in_passing,
    run_layer,
)
from bitassay.quantization.solvers.learned import learn_layer
from bitassay.quantization.solvers.low_rank import corrected
from bitassay.quantization.work import read_part, write_part
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, and its weights in front of their last rounding, from where learning goes on; None
    where nothing will."""

    tensor: QuantizedTensor
    latent: Float[Tensor, "out in"] | None

    def latent_weight(self) -> LatentWeight:
        """Where learning starts."""
        tensor = self.tensor
        assert self.latent is not None
        return LatentWeight(tensor.scheme, self.latent, tensor.grid, tensor.low_rank)


def quantize_layers(
    draft: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    recipe: Recipe,
    tokens: Int[Tensor, "samples tokens"],
    folder: RunFolder | None,
    progress: Progress,
) -> dict[str, Solved]:
    """Every matrix that has a scheme, layer by layer; `draft` gets the dequantized weights on the way."""
    layers, what = decoder_layers(draft), f"quantizing by {recipe.name}"
    prefix = module_name(draft, layers)
    stream = first_inputs(draft, tokens)
    hidden, arguments = stream
    reference, beside = stream.beside() if recipe.learned is not None else (None, arguments)
    kept = [folder is not None and folder.has_tensors(_part(index)) for index in range(len(layers))]
    solved: dict[str, Solved] = {}
    for index, layer in enumerate(layers):
        progress(what, index, len(layers))
        here = f"{prefix}.{index}."
        own = {
            name: scheme for name, scheme in schemes.items() if name.startswith(here) and scheme is not None
        }
        work = _LayerWork(draft, own, recipe, progress)
        if folder is not None and all(kept[index:]):  # no layer is left that wants what this one puts out
            work.solved = _read_layer(folder, index, work)
            work.put(work.solved)
            solved |= work.solved
            continue
        targets = None if reference is None else work.output(layer, reference, beside[index])
        if folder is not None and kept[index]:
            work.solved = _read_layer(folder, index, work)
            work.put(work.solved)
            hidden = work.output(layer, hidden, arguments[index])
        else:
            entering = hidden
            hidden = work.run(layer, entering, arguments[index])
            if recipe.learned is not None and work.linears:
                assert targets is not None
                work.learn(layer, here, entering, targets, arguments[index])
                hidden = work.output(layer, entering, arguments[index])
            work.forget_latents(keep=work.linears if recipe.tune is not None else ())
            if folder is not None:
                _write_layer(folder, index, work.solved)
        reference = targets
        solved |= work.solved
    progress(what, len(layers), len(layers))
    return solved


class _LayerWork:
    """One layer's matrices while they are quantized, by their full names."""

    def __init__(
        self,
        draft: PreTrainedModel,
        schemes: Mapping[str, WeightScheme],
        recipe: Recipe,
        progress: Progress,
    ):
        self.draft, self.schemes, self.recipe, self.progress = draft, schemes, recipe, progress
        self.calibration = recipe.text
        modules = dict(draft.named_modules())
        self.linears = {
            name: module for name in schemes if isinstance(module := modules.get(name), nn.Linear)
        }
        self.slices = [name for name in schemes if name not in self.linears]
        for parameter in dict.fromkeys(name.rpartition(".")[0] for name in self.slices):
            owner, _, key = parameter.rpartition(".")
            fused = draft.get_submodule(owner).get_parameter(key)
            draft.get_submodule(owner).register_parameter(
                key, nn.Parameter(fused.clone(), requires_grad=False)
            )
        self.solved: dict[str, Solved] = {}

    def output(self, layer: nn.Module, hidden: Hidden, arguments: Arguments) -> Hidden:
        """The layer's output as it is now."""
        with products_in(self.calibration.precision, self.draft.device):
            return run_layer(layer, hidden, arguments)

    def run(self, layer: nn.Module, hidden: Hidden, arguments: Arguments) -> Hidden:
        """The layer's output, every matrix quantized on the way when its input arrives."""
        with products_in(self.calibration.precision, self.draft.device):
            return self._run(layer, hidden, arguments)

    def _run(self, layer: nn.Module, hidden: Hidden, arguments: Arguments) -> Hidden:
        groups = input_groups(layer, hidden, arguments, self.linears)
        self._round_unreached({name for name in self.linears if not any(name in one for one in groups)})
        if not self.slices:
            return quantize_in_passing(layer, hidden, arguments, self.linears, groups, self.solve)

        def reached(name: str, inputs: Float[Tensor, "rows _"]) -> None:
            if name in self.schemes and name not in self.solved:
                self.solve((name,), hessian_of(inputs))

        with expert_inputs(self.draft, reached, every=self.calibration.every_expert) as load:
            output = quantize_in_passing(layer, hidden, arguments, self.linears, groups, self.solve)
        warn_of_few({name: counts for name, counts in load.items() if counts.any()}, progress=self.progress)
        self._round_unreached({name for name in self.slices if name not in self.solved})
        self.put(self.slices)
        return output

    def _round_unreached(self, names: Container[str]) -> None:
        """Round matrices to nearest that no token reaches, so that their Hessians are unknown: of experts
        that are never chosen, and of modules that a text alone does not use, such as cross attention."""
        unreached = [name for name in self.schemes if name in names]
        for name in unreached:
            weight = self.weight(name)
            self.solved[name] = Solved(quantize_tensor(weight, self.schemes[name], name), weight.float())
        self.put(unreached)
        if linears := [name for name in unreached if name in self.linears]:
            others = f" and {len(linears) - 1} more" if linears[1:] else ""
            self.progress(f"{linears[0]}{others}: rounded to nearest, since no token gets there")

    def weight(self, name: str) -> Float[Tensor, "out in"]:
        """The matrix as the draft holds it now."""
        return self.linears[name].weight if name in self.linears else expert_matrix(self.draft, name)

    def weights(self) -> dict[str, Float[Tensor, "out in"]]:
        """All of them."""
        return {name: self.weight(name) for name in self.schemes}

    def put(self, names: Iterable[str]) -> None:
        """Give the draft the dequantized weights, in its dtype."""
        for name in names:
            weight = self.solved[name].tensor.dequantize()
            if name in self.linears:
                linear = self.linears[name]
                linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
            else:
                self.weight(name).copy_(weight)

    def solve(self, names: tuple[str, ...], hessian: Float[Tensor, "in in"]) -> None:
        """Quantize matrices that read the same input; those of one scheme in one go."""
        by_scheme: dict[str, list[str]] = {}
        for name in names:
            by_scheme.setdefault(self.schemes[name].model_dump_json(), []).append(name)
        with products_in(None, self.draft.device):
            for members in by_scheme.values():
                self.solved |= self._together(members, hessian)
            self.put(names)

    def _together(self, members: list[str], hessian: Float[Tensor, "in in"]) -> dict[str, Solved]:
        scheme, weights = self.schemes[members[0]], [self.weight(name) for name in members]
        for name, weight in zip(members, weights, strict=True):
            check_weight(weight, scheme, name)
        low_rank, spec = self.recipe.low_rank, self.recipe.gptq
        several = scheme.has_planes or scheme.copies is not None
        if low_rank is not None or spec is None or several or scheme.granularity == "tensor":
            pairs = zip(members, weights, strict=True)
            return {name: self._alone(name, weight, hessian, scheme) for name, weight in pairs}
        stacked = torch.cat(weights)
        scheme = adapted(stacked, scheme, hessian.diagonal().float())
        rounded = self._by_gptq(members[0], stacked, hessian, [scheme], spec)
        stops = list(itertools.accumulate(len(weight) for weight in weights))
        rows = [slice(a, b) for a, b in itertools.pairwise([0, *stops])]
        return {
            name: Solved(rounded.tensor(own), rounded.updated[own])
            for name, own in zip(members, rows, strict=True)
        }

    def _alone(
        self,
        name: str,
        weight: Float[Tensor, "out in"],
        hessian: Float[Tensor, "in in"],
        scheme: WeightScheme,
    ) -> Solved:
        spec, low_rank, last = self.recipe.gptq, self.recipe.low_rank, weight.float()
        scheme = adapted(weight, scheme, hessian.diagonal().float())

        def quantized(w: Float[Tensor, "out in"]) -> QuantizedTensor:
            nonlocal last
            if spec is None:
                last = w.float()
                return quantize_tensor(w, scheme, name, hessian.diagonal().float())
            if scheme.has_planes:
                tensor, last, _ = gptq_binary(w, hessian, scheme, spec)
                return tensor
            copies = scheme.copies
            if copies is not None and copies.differ == "digits":
                rounded = self._by_gptq(name, w, hessian, [copies.whole(scheme)], spec)
                last = rounded.updated
                return merged(digit_planes(rounded.tensor(), scheme))
            schemes = [scheme] if copies is None else copies.schemes(scheme)
            parts, left = list[QuantizedTensor](), w.float()
            for some in [schemes] if spec.planes is None else [[own] for own in schemes]:
                rounded = self._by_gptq(name, left, hessian, some, spec)
                last = rounded.updated
                parts += planes(rounded.tensor())
                left = left - rounded.tensor().dequantize()
            return merged(parts)

        alone = low_rank is None
        return Solved(quantized(weight) if alone else corrected(weight, hessian, low_rank, quantized), last)

    def _by_gptq(
        self, name: str, weight: Tensor, hessian: Tensor, schemes: Sequence[WeightScheme], spec: Gptq
    ) -> Rounded:
        rounded = gptq(weight, hessian, schemes, spec)
        if rounded.damping > spec.damping:
            self.progress(f"{name}: the Hessian needed damping of {rounded.damping:g}")
        return rounded

    def forget_latents(self, keep: Container[str]) -> None:
        """Nothing goes on from the others, which would be a second copy of the layer in fp32."""
        self.solved = {
            n: found if n in keep else Solved(found.tensor, None) for n, found in self.solved.items()
        }

    def learn(
        self, layer: nn.Module, prefix: str, hidden: Hidden, targets: Hidden, arguments: Arguments
    ) -> None:
        """Move the linears on from what was solved, to the layer's own output."""
        assert self.recipe.learned is not None
        latents = {name: self.solved[name].latent_weight() for name in self.linears}
        own = {name.removeprefix(prefix): latent for name, latent in latents.items()}
        losses = learn_layer(layer, own, hidden, targets, arguments, self.recipe.learned)
        self.progress(f"{prefix[:-1]}: error {losses[0]:.3g} -> {losses[-1]:.3g}")
        self.solved |= {name: Solved(latent.quantized(), latent.weight()) for name, latent in latents.items()}
        self.put(latents)


def _part(index: int) -> str:
    """The file of a finished layer."""
    return f"layer-{index:04d}"


def _write_layer(folder: RunFolder, index: int, solved: Mapping[str, Solved]) -> None:
    """Keep a finished layer."""
    latents = {f"{name}/latent": found.latent for name, found in solved.items() if found.latent is not None}
    write_part(folder, _part(index), {name: found.tensor for name, found in solved.items()}, latents)


def _read_layer(folder: RunFolder, index: int, work: _LayerWork) -> dict[str, Solved]:
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in work.weights().items()}
    tensors, latents = read_part(folder, _part(index), shapes)
    return {name: Solved(tensor, latents.get(f"{name}/latent")) for name, tensor in tensors.items()}

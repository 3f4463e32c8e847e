"""From a recipe to quantized matrices: `quantize`.

    rotation -> smoothing -> mixed -> each layer in turn {rounding -> learned -> low_rank} -> tune

Each part of a recipe that is present is done, in this order; `Recipe` says which belong together. Without any
of them a matrix is rounded to nearest on its own and no text is read. Everything else works on a copy of the
model, and calibrates it with the text that `calibration` names.

With a work folder every finished layer is a file there, and so is tuning every few steps; the same call goes
on where the last one stopped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.load import Identity
from bitassay.models.walk import decoder_layers, module_name
from bitassay.quantize.calibration import Calibration, calibration_tokens
from bitassay.quantize.gptq import gptq
from bitassay.quantize.latent import LatentWeight, latent_linears
from bitassay.quantize.layerwise import Hidden, first_inputs, quantize_in_passing, run_layer
from bitassay.quantize.layout import Stored, description, read_tensor, stored_tensors
from bitassay.quantize.learned import Learned, learn_layer
from bitassay.quantize.model import (
    Quantization,
    check_recipe,
    copy_sharing_parameters,
    quantization_of,
    with_tensors,
)
from bitassay.quantize.recipe import Recipe, find_recipe
from bitassay.quantize.scales import Grid
from bitassay.quantize.scheme import WeightScheme
from bitassay.quantize.tensor import QuantizedTensor, check_weight, from_codes, quantize_tensor
from bitassay.quantize.tune import last_states, own_norms, tune
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, and its weights in front of their last rounding, from where learning goes on."""

    tensor: QuantizedTensor
    latent: Float[Tensor, "out in"]

    def latent_weight(self) -> LatentWeight:
        """Where learning starts."""
        tensor = self.tensor
        grid = Grid(
            tensor.scale.float(),
            tensor.zero_points(),
            None if tensor.mean is None else tensor.mean.float(),
            tensor.scheme.offset,
            tensor.scheme.restricted,
        )
        return LatentWeight(tensor.scheme, self.latent, grid)


def quantize(
    base: PreTrainedModel,
    recipe: str | Path | Recipe,
    *,
    packed: bool = False,
    work: str | Path | None = None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """A copy of `base` with the decoder layers' linears and experts quantized by `recipe`; `base` stays as it
    is.

    packed: store codes (a real model) instead of dequantized weights (a fake one). work: a folder for what is
    finished of a calibrated recipe; the same call goes on with it. The copy carries `.quantization`. Raises
    BitassayError where the recipe names modules that do not exist, where weights are not finite, or where the
    model has matrices that would be skipped.
    """
    found = find_recipe(recipe)
    return with_tensors(base, quantize_tensors(base, found, progress, work), packed=packed)


def quantize_tensors(
    base: PreTrainedModel, recipe: Recipe, progress: Progress = silent, work: str | Path | None = None
) -> Quantization:
    """What `recipe` makes of `base`, without a model around it; errors as `quantize`."""
    known = getattr(base, "identity", None)
    if quantization_of(base) is not None or (isinstance(known, Identity) and known.recipe_id is not None):
        raise BitassayError("the model is quantized already", "quantize the base model instead")
    weights = check_recipe(base, recipe)
    if not recipe.is_calibrated:
        return Quantization(recipe, _to_nearest(weights, recipe, progress))
    draft = copy_sharing_parameters(base)
    tokens = calibration_tokens(base, recipe.calibration or Calibration())
    folder = None if work is None else RunFolder(Path(work), _plan(base, recipe))
    schemes = {name: recipe.scheme_for(name) for name in weights}
    solved = quantize_layers(draft, schemes, recipe, tokens, folder, progress)
    if recipe.tune is not None:
        return _tuned(base, draft, solved, recipe, tokens, folder, progress)
    return Quantization(recipe, {name: found.tensor for name, found in solved.items()})


def _tuned(
    base: PreTrainedModel,
    draft: PreTrainedModel,
    solved: Mapping[str, Solved],
    recipe: Recipe,
    tokens: Int[Tensor, "samples tokens"],
    folder: RunFolder | None,
    progress: Progress,
) -> Quantization:
    """What end-to-end tuning makes of the layers' solutions."""
    spec = recipe.tune
    assert spec is not None
    progress("running the base model over the calibration text")
    wanted = last_states(base, tokens)
    latents = {name: found.latent_weight() for name, found in solved.items()}
    norms = own_norms(draft)
    with latent_linears(draft, latents):
        for step, loss in tune(draft, latents, norms.values(), tokens, wanted, spec, folder):
            progress(f"tuning by {recipe.name}, KL {loss:.3f}", step, spec.steps)
    tensors = {name: latent.quantized() for name, latent in latents.items()}
    return Quantization(recipe, tensors, {name: gain.detach() for name, gain in norms.items()})


def _to_nearest(
    weights: Mapping[str, Float[Tensor, "_ _"]], recipe: Recipe, progress: Progress
) -> dict[str, QuantizedTensor]:
    tensors = {}
    for done, (name, weight) in enumerate(weights.items()):
        progress(f"quantizing by {recipe.name}", done, len(weights))
        if scheme := recipe.scheme_for(name):
            tensors[name] = quantize_tensor(weight, scheme, name)
    progress(f"quantizing by {recipe.name}", len(weights), len(weights))
    return tensors


def _plan(base: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """What a work folder belongs to."""
    known = getattr(base, "identity", None)
    digest = known.weights_digest if isinstance(known, Identity) else None
    return {"kind": "quantize", "weights": digest, "dtype": str(base.dtype), "recipe": recipe.recipe_id}


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
    hidden, arguments = first_inputs(draft, tokens)
    reference = hidden if recipe.learned is not None else None
    solved: dict[str, Solved] = {}
    for index, layer in enumerate(layers):
        progress(what, index, len(layers))
        here = f"{prefix}.{index}."
        own = {name.removeprefix(here): scheme for name, scheme in schemes.items() if name.startswith(here)}
        work = _LayerWork(layer, own, recipe, here, progress)
        targets = None if reference is None else run_layer(layer, reference, arguments[index])
        if folder is not None and folder.has_tensors(f"layer-{index:04d}"):
            work.solved = _read_layer(folder, index, layer)
            work.put_weights()
            hidden = run_layer(layer, hidden, arguments[index])
        else:
            entering = hidden
            hidden = quantize_in_passing(layer, hidden, arguments[index], work.linears, work.solve)
            if recipe.learned is not None:
                assert targets is not None
                work.learn(entering, targets, arguments[index], recipe.learned)
                hidden = run_layer(layer, entering, arguments[index])
            if folder is not None:
                _write_layer(folder, index, work.solved)
        reference = targets
        solved |= {here + name: found for name, found in work.solved.items()}
    progress(what, len(layers), len(layers))
    return solved


class _LayerWork:
    """One layer's matrices while they are quantized, by their names within it."""

    def __init__(
        self,
        layer: nn.Module,
        schemes: Mapping[str, WeightScheme | None],
        recipe: Recipe,
        prefix: str,
        progress: Progress,
    ):
        self.layer, self.schemes, self.recipe = layer, schemes, recipe
        self.prefix, self.progress = prefix, progress
        self.linears = {
            name: module
            for name in schemes
            if schemes[name] is not None and isinstance(module := layer.get_submodule(name), nn.Linear)
        }
        self.solved: dict[str, Solved] = {}

    def solve(self, names: tuple[str, ...], hessian: Float[Tensor, "in in"]) -> None:
        """Quantize linears that read the same input, and give them the dequantized weights."""
        by_scheme: dict[str, list[str]] = {}
        for name in names:
            by_scheme.setdefault(self.schemes[name].model_dump_json(), []).append(name)  # type: ignore[union-attr]
        for members in by_scheme.values():
            scheme = self.schemes[members[0]]
            assert scheme is not None
            if self.recipe.gptq is None or scheme.granularity == "tensor":
                groups = [[name] for name in members]
            else:
                groups = [members]
            for group in groups:
                self._solve_alike(group, hessian, scheme)
        self.put_weights(names)

    def _solve_alike(self, names: list[str], hessian: Float[Tensor, "in in"], scheme: WeightScheme) -> None:
        weights = [self.linears[name].weight for name in names]
        for name, weight in zip(names, weights, strict=True):
            check_weight(weight, scheme, self.prefix + name)
        if self.recipe.gptq is None:
            (name,), (weight,) = names, weights
            tensor = quantize_tensor(weight, scheme, self.prefix + name, hessian.diagonal().float())
            self.solved[name] = Solved(tensor, weight.float())
            return
        found = gptq(torch.cat(weights), hessian, scheme, self.recipe.gptq)
        if found.damping > self.recipe.gptq.damping:
            self.progress(f"{self.prefix}{names[0]}: the Hessian needed damping of {found.damping:g}")
        start = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + len(weight))
            start += len(weight)
            grid = (
                found.grid
                if scheme.granularity == "tensor"
                else found.grid.each(lambda part, r=rows: part[r])
            )
            tensor = from_codes(found.codes[rows], grid.scale, scheme, grid.zero_point, grid.mean)
            self.solved[name] = Solved(tensor, found.compensated[rows])

    def put_weights(self, names: Iterable[str] | None = None) -> None:
        """The dequantized weights into the layer, in its dtype."""
        for name in self.solved if names is None else names:
            weight = self.solved[name].tensor.dequantize().to(self.linears[name].weight.dtype)
            self.linears[name].weight = nn.Parameter(weight, requires_grad=False)

    def learn(self, hidden: Hidden, targets: Hidden, arguments: dict[str, Any], spec: Learned) -> None:
        """Go on from what was solved, to the layer's own output."""
        latents = {name: found.latent_weight() for name, found in self.solved.items()}
        losses = learn_layer(self.layer, latents, hidden, targets, arguments, spec)
        self.progress(f"{self.prefix[:-1]}: error {losses[0]:.3g} -> {losses[-1]:.3g}")
        self.solved = {name: Solved(latent.quantized(), latent.weight()) for name, latent in latents.items()}
        self.put_weights()


def _write_layer(folder: RunFolder, index: int, solved: Mapping[str, Solved]) -> None:
    """Keep a finished layer: how each matrix is stored, then the parts, which make it finished."""
    name = f"layer-{index:04d}"
    folder.part(name, lambda: {n: description(s.tensor).model_dump(mode="json") for n, s in solved.items()})
    parts = {
        f"{n}/{part}": value for n, s in solved.items() for part, value in stored_tensors(s.tensor).items()
    }
    latents = {f"{n}/latent": s.latent for n, s in solved.items()}
    folder.write_tensors(name, {key: value.contiguous() for key, value in (parts | latents).items()})


def _read_layer(folder: RunFolder, index: int, layer: nn.Module) -> dict[str, Solved]:
    name = f"layer-{index:04d}"
    kept, parts, solved = folder.part(name, dict), folder.read_tensors(name), {}
    for own, stored in kept.items():
        found = {k.removeprefix(f"{own}/"): v for k, v in parts.items() if k.startswith(f"{own}/")}
        latent = found.pop("latent")
        shape = tuple(layer.get_submodule(own).weight.shape)
        solved[own] = Solved(read_tensor(found, Stored.model_validate(stored), shape), latent)
    return solved

"""From a recipe to quantized matrices: `quantize`.

    rotation -> smoothing -> mixed -> each layer in turn {rounding -> low_rank -> learned} -> tune
    -> activations -> replication

Each part of a recipe that is present is done, in this order; `Recipe` says which belong together. Without any
of them a matrix is rounded to nearest on its own and no text is read. Everything else works on a copy of the
model, and calibrates it with the text that `calibration` names. A recipe that names one has its scale
searches weighed by the inputs; a part that needs text where none is named reads the default one for itself.

With a work folder every finished layer is a file there, so is tuning every few steps, and in the end the
result; the same call goes on where the last one stopped. In the cache, recipes that differ only in what comes
after the codes (rounded inputs, a rounded cache, copies that share codes) share the folder of their codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.identity import Identity, identity
from bitassay.models.load import load_checkpoint
from bitassay.models.options import LoadOptions
from bitassay.models.source import cache_folder, resolve
from bitassay.models.walk import matrices, walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.inputs.ranges import collect_ranges, input_roundings
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.replication.layer_copies import copies_by_layer, with_copies
from bitassay.quantization.runtime.model import (
    Quantization,
    check_recipe,
    copy_sharing_parameters,
    quantization_of,
    with_tensors,
)
from bitassay.quantization.solvers.budget import mixed_schemes
from bitassay.quantization.solvers.generated import lessons
from bitassay.quantization.solvers.latent import latent_linears
from bitassay.quantization.solvers.layers import quantize_layers
from bitassay.quantization.solvers.sensitivity import places
from bitassay.quantization.solvers.tune import KEEP_STEPS, head_weight, own_norms, tune
from bitassay.quantization.transforms.rotation import changed_parameters, rotate
from bitassay.quantization.transforms.smoothing import smooth
from bitassay.quantization.work import RESULT, code_digest, read_result, write_result
from bitassay.record.files import locked
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder


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


def quantize_once(
    base: PreTrainedModel, recipe: str | Path | Recipe, *, packed: bool = False, progress: Progress = silent
) -> PreTrainedModel:
    """`quantize`, but what a calibrated recipe made of a model that was loaded is kept in the cache, so that
    an hour of work is done once, whichever commands use it."""
    found = find_recipe(recipe)
    model = with_tensors(base, quantize_tensors_once(base, found, progress), packed=packed)
    return model.to(base.device)  # type: ignore[arg-type]


def quantize_tensors_once(base: PreTrainedModel, recipe: Recipe, progress: Progress = silent) -> Quantization:
    """`quantize_tensors`, kept as `quantize_once` says. Calibration is in float32 whatever the dtype of
    `base`: a prover in bf16 and a verifier in float32 get the same codes."""
    if not recipe.is_calibrated:
        return quantize_tensors(base, recipe, progress)
    _refuse_quantized(base)
    source = identity(base).source
    plan = _plan(base, recipe) | {"dtype": str(torch.float32)}
    name = f"{source.name}-{digest_json([plan, code_digest()])[:16]}"  # whatever the recipe is called

    def exact() -> PreTrainedModel:
        if base.dtype == torch.float32 and base.device.type == "cpu":
            return base
        own_code = type(base).__module__.startswith("transformers_modules")
        return load_checkpoint(resolve(source.folder), LoadOptions(trust_remote_code=own_code), progress)

    def codes(draft: PreTrainedModel) -> Quantization | None:
        same = recipe.codes_alone
        return None if same.recipe_id == recipe.recipe_id else quantize_tensors_once(draft, same, progress)

    return _kept(base, exact, recipe, plan, cache_folder() / "quantized" / name, progress, codes)


def quantize_tensors(
    base: PreTrainedModel,
    recipe: Recipe,
    progress: Progress = silent,
    work: str | Path | None = None,
    solved: Quantization | None = None,
) -> Quantization:
    """What `recipe` makes of `base`, without a model around it; errors as `quantize`. solved: of the recipe
    `codes_alone`, the codes."""
    _refuse_quantized(base)
    if work is None or not recipe.is_calibrated:
        return _quantized(base, recipe, check_recipe(base, recipe), progress, solved=solved)
    return _kept(base, lambda: base, recipe, _plan(base, recipe), Path(work), progress, lambda _draft: solved)


def _kept(
    base: PreTrainedModel,
    exact: Callable[[], PreTrainedModel],
    recipe: Recipe,
    plan: dict[str, Any],
    work: Path,
    progress: Progress,
    codes: Callable[[PreTrainedModel], Quantization | None] = lambda draft: None,
) -> Quantization:
    """The result in that work folder, made there of the model `exact()` where it is not finished yet, around
    its `codes` where there are some."""
    weights = check_recipe(base, recipe)
    with locked(work, progress):
        folder = RunFolder(work, plan)
        if folder.has_tensors(RESULT):
            shapes = {
                name: (w.shape[0], w.shape[1]) for name, w in weights.items() if recipe.scheme_for(name)
            }
            return Quantization(recipe, *read_result(folder, shapes))
        draft = exact()
        made = _quantized(draft, recipe, check_recipe(draft, recipe), progress, folder, codes(draft))
        write_result(folder, made.tensors, made.parameters, made.inputs, made.passes)
        return made


def _quantized(
    base: PreTrainedModel,
    recipe: Recipe,
    weights: Mapping[str, Float[Tensor, "_ _"]],
    progress: Progress,
    folder: RunFolder | None = None,
    solved: Quantization | None = None,
) -> Quantization:
    """solved: the codes, by a recipe that has the same."""
    if recipe.is_calibrated and base.device.type != "cpu":
        raise BitassayError(
            f"{recipe.name} is calibrated, which runs on the CPU, and the model is on {base.device}",
            "load it on the CPU, quantize, and move the result",
        )
    tokens = calibration_tokens(base, recipe.calibration or Calibration()) if recipe.is_calibrated else None
    if solved is not None and recipe.replication is None:
        made = replace(solved, recipe=recipe)
        return replace(made, inputs=_inputs(base, made, tokens, {}, progress))
    draft, schemes = _prepared(base, recipe, weights, tokens, folder, progress)
    counts = _counts(draft, recipe, schemes, tokens, folder, progress)
    before, first = copy_sharing_parameters(draft), _schemes_with_copies(draft, recipe, schemes, counts)
    if solved is None:
        weighed = recipe.calibration is not None and any(one and one.weighs_inputs for one in first.values())
        if recipe.solves or weighed:
            assert tokens is not None
            tensors = _calibrated(base, draft, first, recipe, tokens, folder, progress)
        else:
            tensors = _to_nearest(matrices(draft), first, recipe.name, progress)
        solved = Quantization(recipe, tensors, _beside(base, draft, tensors))
    made = replace(solved, recipe=recipe)
    made = replace(made, inputs=_inputs(base, made, tokens, counts, progress))
    if not counts:
        return made
    return with_copies(base, made, before, schemes, counts, tokens, progress)


def _prepared(
    base: PreTrainedModel,
    recipe: Recipe,
    weights: Mapping[str, Float[Tensor, "_ _"]],
    tokens: Int[Tensor, "samples tokens"] | None,
    folder: RunFolder | None,
    progress: Progress,
) -> tuple[PreTrainedModel, dict[str, WeightScheme | None]]:
    """The model whose matrices are rounded, and each one's scheme."""
    draft = copy_sharing_parameters(base)
    if recipe.rotation is not None:
        progress(f"rotating by {recipe.name}")
        rotate(draft, recipe.rotation, tokens)
    if recipe.smoothing is not None:
        assert tokens is not None
        ranges = collect_ranges(draft, tokens, progress=progress)
        smoothed = smooth(draft, recipe.smoothing, ranges, recipe.scheme_for, progress)
        if smoothed.skipped:
            name, why = next(iter(smoothed.skipped.items()))
            progress(f"not smoothed: {len(smoothed.skipped)} linears, the first {name}: {why}")
    if recipe.mixed is None:
        return draft, {name: recipe.scheme_for(name) for name in weights}
    assert tokens is not None
    return draft, mixed_schemes(draft, recipe, tokens, progress, folder)


def _counts(
    draft: PreTrainedModel,
    recipe: Recipe,
    schemes: Mapping[str, WeightScheme | None],
    tokens: Int[Tensor, "samples tokens"] | None,
    folder: RunFolder | None,
    progress: Progress,
) -> dict[int, int]:
    """How many copies each layer gets that gets several."""
    plan = recipe.replication
    if plan is None or plan.changes_nothing:
        return {}

    def measured() -> dict[str, int]:
        found = copies_by_layer(draft, plan, schemes, tokens, progress)
        return {str(index): count for index, count in found.items()}

    counts = measured() if folder is None else folder.part("copies", measured)
    return {int(index): count for index, count in counts.items()}


def _schemes_with_copies(
    draft: PreTrainedModel,
    recipe: Recipe,
    schemes: Mapping[str, WeightScheme | None],
    counts: Mapping[int, int],
) -> dict[str, WeightScheme | None]:
    """What each matrix is quantized by: as copies that are merged, or as the first copy of its layer."""
    plan, where, found = recipe.replication, places(draft), dict(schemes)
    if plan is None or not plan.makes_codes:
        return found
    for name, scheme in schemes.items():
        if scheme is not None and (count := counts.get(where[name].layer)) is not None:
            copies = plan.of_matrices(count)
            found[name] = scheme.with_copies(copies) if plan.of == "linear" else copies.scheme(scheme, 0)
    return found


def _calibrated(
    base: PreTrainedModel,
    draft: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    recipe: Recipe,
    tokens: Int[Tensor, "samples tokens"],
    folder: RunFolder | None,
    progress: Progress,
) -> dict[str, QuantizedTensor]:
    """Layer by layer, then all layers together; `draft` is left with the norms that go with the result."""
    if recipe.learned is not None or recipe.tune is not None:
        _check_experts(draft, schemes, progress)
    solved = quantize_layers(draft, schemes, recipe, tokens, folder, progress)
    if recipe.tune is None:
        return {name: found.tensor for name, found in solved.items()}
    tokens, wanted = lessons(base, tokens, recipe.tune, folder, progress)
    linears = walk(draft).linears
    latents = {name: solved.pop(name).latent_weight() for name in list(solved) if name in linears}
    head = head_weight(base)
    steps = tune(draft, latents, own_norms(draft), tokens, wanted, head, recipe.tune, folder)
    what, losses = f"tuning by {recipe.name}", []
    with latent_linears(draft, latents):
        for step, loss in steps:
            progress(what, step, recipe.tune.steps)
            losses.append(loss)
            if step % KEEP_STEPS == 0 or step == recipe.tune.steps:
                progress(f"step {step}: KL {sum(losses) / len(losses):.3f}, the mean of {len(losses)} steps")
                losses.clear()
    experts = {name: found.tensor for name, found in solved.items()}
    return experts | {name: latent.quantized() for name, latent in latents.items()}


def _inputs(
    base: PreTrainedModel,
    made: Quantization,
    tokens: Int[Tensor, "samples tokens"] | None,
    counts: Mapping[int, int],
    progress: Progress,
) -> dict[str, InputRounding]:
    """How inputs are rounded, static ones by their ranges in the model with quantized weights; where linears
    have copies that differ by that, as the mean of as many roundings."""
    spec, plan = made.recipe.activations, made.recipe.replication
    if spec is None:
        return {}
    model, ranges = with_tensors(base, made), None
    if spec.any_needs_calibration:
        assert tokens is not None
        ranges = collect_ranges(model, tokens, progress=progress)
    found = input_roundings(model, spec, ranges)
    if plan is not None and (plan.of, plan.differ) == ("linear", "inputs"):
        where = places(base)
        found = {n: replace(rounding, copies=counts.get(where[n].layer, 1)) for n, rounding in found.items()}
    return found


def _beside(
    base: PreTrainedModel, draft: PreTrainedModel, tensors: Mapping[str, QuantizedTensor]
) -> dict[str, Tensor]:
    """What changed that is not a quantized matrix."""
    quantized = {f"{name}.weight" for name in tensors} | {name.rpartition(".")[0] for name in tensors}
    changed = changed_parameters(base, draft)
    return {name: value for name, value in changed.items() if name not in quantized}


def _refuse_quantized(model: PreTrainedModel) -> None:
    known = getattr(model, "identity", None)
    rounds_inputs = any(hasattr(module, "quantization_scheme") for module in model.modules())
    if (
        rounds_inputs
        or quantization_of(model) is not None
        or (isinstance(known, Identity) and known.recipe_id is not None)
    ):
        raise BitassayError("the model is quantized already", "quantize the base model instead")


def _check_experts(
    model: PreTrainedModel, schemes: Mapping[str, WeightScheme | None], progress: Progress
) -> None:
    """Raises BitassayError where learned and tune would have nothing to move."""
    linears, quantized = walk(model).linears, [name for name, scheme in schemes.items() if scheme is not None]
    experts = [name for name in quantized if name not in linears]
    if not experts:
        return
    if len(experts) == len(quantized):
        raise BitassayError(
            "learned and tune move the weights of linears, and only experts are quantized", "gptq alone"
        )
    progress(
        f"learned and tune move linears; the {len(experts)} matrices of experts stay as they were solved"
    )


def _to_nearest(
    weights: Mapping[str, Float[Tensor, "_ _"]],
    schemes: Mapping[str, WeightScheme | None],
    recipe_name: str,
    progress: Progress,
) -> dict[str, QuantizedTensor]:
    tensors = {}
    for done, (name, weight) in enumerate(weights.items()):
        progress(f"quantizing by {recipe_name}", done, len(weights))
        if scheme := schemes[name]:
            tensors[name] = quantize_tensor(weight, scheme, name)
    progress(f"quantizing by {recipe_name}", len(weights), len(weights))
    return tensors


def _plan(base: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """What a work folder belongs to."""
    known = getattr(base, "identity", None)
    digests = [known.weights_digest, known.config_digest] if isinstance(known, Identity) else None
    return {"kind": "quantize", "model": digests, "dtype": str(base.dtype), "recipe": recipe.recipe_id}

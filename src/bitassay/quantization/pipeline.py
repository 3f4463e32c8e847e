"""From a recipe to quantized matrices: `quantize`.

    rotation -> smoothing -> mixed -> each layer in turn {gptq or nearest -> low_rank -> learned} -> tune
    -> activations -> replication

Each part of a recipe that is present is done, in this order: PREPARE changes a working copy of the model and
decides how each matrix is stored, SOLVERS (`solvers/registry.py`) find the codes, FINISH adds what belongs to
them. Without any part a matrix is rounded to nearest on its own and no text is read. A recipe that names a
`calibration` has its scale searches weighed by the inputs; a part that needs text where none is named reads
the default one for itself.

With a work folder every finished layer is a file there, so is tuning every few steps, and in the end the
result; the same call goes on where the last one stopped. In the cache, recipes that differ only in what comes
after the codes (rounded inputs, a rounded cache, copies that share codes) share the folder of their codes.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.identity import Identity, identity
from bitassay.models.load import load_checkpoint
from bitassay.models.opened import is_opened, present
from bitassay.models.options import LoadOptions
from bitassay.models.source import cache_folder, resolve
from bitassay.models.walk import decoder_layers, matrices, module_name
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.ranges import SAMPLED_TOKENS, SAMPLING, collect_ranges, input_roundings
from bitassay.quantization.recipe.calibration import calibration_tokens
from bitassay.quantization.recipe.inputs import Activations
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.recipe.solvers import Mixed
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.replication.layer_copies import add_copies, choose_copies
from bitassay.quantization.runtime.experts import matrix_of, owner_of
from bitassay.quantization.runtime.model import (
    Quantization,
    check_opening,
    check_recipe,
    copy_sharing_parameters,
    fitted_to,
    quantization_of,
    with_tensors,
)
from bitassay.quantization.solvers.layers import quantize_calibrated
from bitassay.quantization.solvers.mixed import mixed_schemes
from bitassay.quantization.transforms.rotation import changed_parameters, rotate
from bitassay.quantization.transforms.smoothing import smooth
from bitassay.quantization.work import (
    RESULT,
    KeptTensors,
    WorkingCopy,
    code_digest,
    layer_part,
    read_result,
    write_part,
    write_result,
)
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
    """Return a copy of `base` with the decoder layers' linears and experts quantized by `recipe`; `base`
    stays as it is. packed: store codes (a real model) instead of dequantized weights (a fake one). work: a
    folder for what is finished of a calibrated recipe; the same call goes on with it. The copy carries
    `.quantization`. Raises BitassayError where the recipe names modules that do not exist, where weights are
    not finite, or where the model has matrices that would be skipped."""
    return with_tensors(base, quantize_tensors(base, find_recipe(recipe), progress, work), packed=packed)


def quantize_cached(
    base: PreTrainedModel, recipe: str | Path | Recipe, *, packed: bool = False, progress: Progress = silent
) -> PreTrainedModel:
    """Quantize as `quantize` does, but keep what a calibrated recipe made of a model in the cache."""
    model = with_tensors(base, quantize_tensors_cached(base, find_recipe(recipe), progress), packed=packed)
    return model if is_opened(model) else model.to(base.device)  # type: ignore[arg-type]


def quantize_tensors_cached(
    base: PreTrainedModel, recipe: Recipe, progress: Progress = silent
) -> Quantization:
    """Return what `quantize_cached` puts into a model. Calibration is in float32 whatever the dtype of
    `base`: a prover in bf16 and a verifier in float32 get the same codes. Of an opened model the codes are
    read from the cache when they are asked for."""
    opened, recipe = is_opened(base), _fitted(base, recipe, progress)
    if not (recipe.is_calibrated or opened):
        return quantize_tensors(base, recipe, progress)
    source, plan = identity(base).source, _plan(base, recipe)
    if recipe.is_calibrated:
        plan |= {"dtype": str(torch.float32)}
    name = f"{source.name}-{digest_json([plan, code_digest()])[:16]}"  # whatever the recipe is called

    def make(folder: RunFolder) -> Quantization:
        model, same = base, recipe.without_postprocessing
        if plan["dtype"] != str(base.dtype):
            own_code = type(base).__module__.startswith("transformers_modules")
            options = LoadOptions(device=base.device, trust_remote_code=own_code, opened=opened)
            model = load_checkpoint(resolve(source.folder), options, progress)
        codes = None if same.recipe_id == recipe.recipe_id else quantize_tensors_cached(model, same, progress)
        return _quantized(model, recipe, progress, folder, codes)

    return _kept(base, recipe, plan, cache_folder() / "quantized" / name, progress, make)


def quantize_tensors(
    base: PreTrainedModel,
    recipe: Recipe,
    progress: Progress = silent,
    work: str | Path | None = None,
    codes: Quantization | None = None,
) -> Quantization:
    """Return what `recipe` makes of `base`, without a model around it; errors as `quantize`. codes: what the
    recipe `without_postprocessing` made, where that is known."""
    recipe = _fitted(base, recipe, progress)
    if work is None or not (recipe.is_calibrated or is_opened(base)):
        return _quantized(base, recipe, progress, codes=codes)
    make = partial(_quantized, base, recipe, progress, codes=codes)
    return _kept(base, recipe, _plan(base, recipe), Path(work), progress, make)


def _fitted(base: PreTrainedModel, recipe: Recipe, progress: Progress) -> Recipe:
    recipe, said = fitted_to(base, recipe)
    for line in said:
        progress(line)
    return recipe


def _kept(
    base: PreTrainedModel,
    recipe: Recipe,
    plan: dict[str, Any],
    work: Path,
    progress: Progress,
    make: Callable[[RunFolder], Quantization],
) -> Quantization:
    """Return the result in that work folder; where there is none yet, `make` it there."""
    _refuse_quantized(base)
    weights = check_recipe(base, recipe)
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items() if recipe.scheme_for(name)}
    with locked(work, progress):
        folder = RunFolder(work, plan)
        if not folder.has_tensors(RESULT):
            made = make(folder)
            write_result(folder, made)
            if not isinstance(made.tensors, KeptTensors):
                return made
        made = read_result(folder, recipe, shapes)
    if is_opened(base):
        return made
    return replace(made, tensors=dict(made.tensors), parameters=dict(made.parameters))


def _quantized(
    base: PreTrainedModel,
    recipe: Recipe,
    progress: Progress,
    folder: RunFolder | None = None,
    codes: Quantization | None = None,
) -> Quantization:
    _refuse_quantized(base)
    schemes = {name: recipe.scheme_for(name) for name in check_recipe(base, recipe)}
    if is_opened(base):
        check_opening(recipe)
    tokens = calibration_tokens(base, recipe.text) if recipe.is_calibrated else None
    work = WorkingCopy(base, recipe, copy_sharing_parameters(base), schemes, tokens, folder, progress)
    if codes is None or "replication" in recipe.parts:
        for prepare, part in recipe.steps(PREPARE):
            prepare(work, part)
    made = replace(codes or _solved(work), recipe=recipe)
    for finish, part in recipe.steps(FINISH):
        made = finish(work, part, made)
    return made


def _solved(work: WorkingCopy) -> Quantization:
    recipe, schemes = work.recipe, work.schemes
    weighed = recipe.calibration is not None and any(s and s.uses_importance for s in schemes.values())
    if recipe.uses_calibrated_solver or weighed:
        tensors = quantize_calibrated(work)
    else:
        what, folder = f"quantizing by {recipe.name}", work.folder if is_opened(work.model) else None
        tensors = rounded_to_nearest(work.model, schemes, what, work.progress, folder)
    quantized = {f"{name}.weight" for name in tensors} | {name.rpartition(".")[0] for name in tensors}
    return Quantization(recipe, tensors, changed_parameters(work.base, work.model, quantized))


def rounded_to_nearest(
    model: PreTrainedModel,
    schemes: Mapping[str, WeightScheme | None],
    what: str,
    progress: Progress,
    folder: RunFolder | None = None,
) -> Mapping[str, QuantizedTensor]:
    """Round each matrix of `model` that has a scheme to nearest, on its own. folder: where each layer's are
    kept when it is finished, from which they are read when they are asked for."""
    tensors: dict[str, QuantizedTensor] = {}
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in matrices(model).items() if schemes.get(name)}
    prefix, parts, done = module_name(model, decoder_layers(model)), list[str](), 0
    for index in range(len(decoder_layers(model))):
        names = [name for name in shapes if name.startswith(f"{prefix}.{index}.")]
        part, rounded = layer_part(index), dict[str, QuantizedTensor]()
        if folder is None or not folder.has_tensors(part):
            for owner, own in itertools.groupby(names, partial(owner_of, model)):
                with present(model, owner):
                    for name in own:
                        progress(what, done + len(rounded), len(shapes))
                        scheme = schemes[name]
                        assert scheme is not None
                        rounded[name] = quantize_tensor(matrix_of(model, name), scheme, name)
        done += len(names)
        if folder is None:
            tensors |= rounded
        elif names:
            parts.append(part)
            if not folder.has_tensors(part):
                write_part(folder, part, rounded, {})
    progress(what, len(shapes), len(shapes))
    if folder is None:
        return {name: tensors[name] for name in shapes}
    return KeptTensors(folder, parts, shapes)


def _rotate(work: WorkingCopy, rotation: Rotation) -> None:
    work.progress(f"rotating by {work.recipe.name}")
    rotate(work.model, rotation, work.tokens)


def _smooth(work: WorkingCopy, smoothing: Smoothing) -> None:
    sampled = SAMPLED_TOKENS if smoothing.method == "awq" else 0
    ranges = collect_ranges(work.model, work.text, progress=work.progress, each_batch=False, sampled=sampled)
    skipped = smooth(work.model, smoothing, ranges, work.recipe.scheme_for, work.progress).skipped
    if skipped:
        name, why = next(iter(skipped.items()))
        work.progress(f"not smoothed: {len(skipped)} linears, the first {name}: {why}")


def _allocate(work: WorkingCopy, mixed: Mixed) -> None:
    work.schemes = mixed_schemes(work.model, work.recipe, work.text, work.progress, work.folder)


def _round_inputs(work: WorkingCopy, spec: Activations, made: Quantization) -> Quantization:
    """Say how inputs are rounded: static ones by their ranges in the model with quantized weights."""
    model = with_tensors(work.base, made)
    ranges = None
    if spec.needs_text:
        ranges = collect_ranges(
            model,
            work.text,
            progress=work.progress,
            each_batch=any(scheme.scale == "moving_average" for scheme in spec.schemes),
            sampled=SAMPLED_TOKENS if any(scheme.scale in SAMPLING for scheme in spec.schemes) else 0,
        )
    return replace(made, inputs=input_roundings(model, spec, ranges))


# What a part of a recipe does, by its name, at which step.
PREPARE: dict[str, Callable[[WorkingCopy, Any], None]] = {
    "rotation": _rotate,
    "smoothing": _smooth,
    "mixed": _allocate,
    "replication": choose_copies,
}
FINISH: dict[str, Callable[[WorkingCopy, Any, Quantization], Quantization]] = {
    "activations": _round_inputs,
    "replication": add_copies,
}


def _refuse_quantized(model: PreTrainedModel) -> None:
    known = getattr(model, "identity", None)
    if (
        any(hasattr(module, "quantization_scheme") for module in model.modules())
        or quantization_of(model) is not None
        or (isinstance(known, Identity) and known.recipe_id is not None)
    ):
        raise BitassayError("the model is quantized already", "quantize the base model instead")
    if getattr(model, "engine", None) is not None:
        raise BitassayError("another engine has the weights of this model", "load it without engine=")


def _plan(base: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    known = getattr(base, "identity", None)
    digests = [known.weights_digest, known.config_digest] if isinstance(known, Identity) else None
    return {"kind": "quantize", "model": digests, "dtype": str(base.dtype), "recipe": recipe.recipe_id}

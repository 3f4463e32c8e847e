"""A folder that `quantize.export.save` wrote, back to the model that was saved: codes, recipe and all.

Anybody may have written the folder, so nothing is read before it is sure that it fits. The card names every
quantized matrix and its scheme, `config.json` gives the shapes; from these follow the name, dtype and shape
of each part, which the headers of the files must state, part for part. What else the files hold are plain
parameters, and transformers loads them: none may be missing and none left over.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError, suggestion
from bitassay.models.empty import empty_model
from bitassay.models.identity import attach, identity
from bitassay.models.load import load_checkpoint
from bitassay.models.opened import Unread, open_plain, weights_of
from bitassay.models.options import LoadOptions
from bitassay.models.source import Source
from bitassay.models.transposed import as_linears
from bitassay.models.walk import decoder_layers, matrices, walk
from bitassay.models.weights import Entry, check_files, check_keys
from bitassay.quantization.codes import storage
from bitassay.quantization.codes.storage import Stored
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.export.card import AGAIN, CARD_FILE, Card
from bitassay.quantization.export.layout import Layout
from bitassay.quantization.export.plain_load import Piece, exact_scales, joined, module_names
from bitassay.quantization.export.registry import LAYOUTS
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.quantization.runtime.replicas import is_replica, replica_names
from bitassay.quantization.transforms.folding import INPUT_SCALES
from bitassay.record.progress import Progress, silent


def load_quantized(
    source: Source, card: Card, options: LoadOptions, *, packed: bool = False, progress: Progress = silent
) -> PreTrainedModel:
    """Load the quantized model that `card` describes, fake or `packed`, with its recipe in its identity."""
    read = partial(read_quantized, card=card, packed=packed)
    model = load_checkpoint(source, options, progress, read)
    attach(model, identity=identity(model).with_recipe(card.recipe.recipe_id, card.recipe.name))
    return model


def read_quantized(
    folder: Path, config: PretrainedConfig, options: LoadOptions, *, card: Card, packed: bool
) -> PreTrainedModel:
    """Read the quantized model in `folder`, fake or `packed`. Raises BitassayError for an unfit card."""
    with _naming(folder / CARD_FILE):
        layout = _layout(card)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[attr-defined] # the codes are decoded here
    empty = empty_model(config, options.dtype, trust_remote_code=options.trust_remote_code)
    stored_as = check_files(folder)
    entries = {name: stored_as[key] for key, name in module_names(empty, stored_as).items()}
    with _naming(folder / CARD_FILE):
        _check_passes(card, len(decoder_layers(empty)))
        _check_inputs(card, walk(empty).linears)
        shapes = _shapes(empty, card)
    described = {name: card.schemes[place] for name, place in card.matrices.items()}
    parts = expected_parts(empty, layout, described, shapes)
    _check_parts(parts, entries, folder)
    plain = {key: entry for key, entry in entries.items() if key not in parts}
    scales = _input_scales(empty, card.recipe, plain, folder)
    originals = {name for name in described if not is_replica(name)}
    pieces = layout.pieces(empty)
    readers = {
        name: partial(_read_matrix, name, stored, shapes[name], layout, entries, pieces.get(name))
        for name, stored in described.items()
    }
    tensors: Mapping[str, QuantizedTensor]
    if options.opened:
        model = open_plain(folder, config, options, plain, originals)
        tensors = Unread(readers)
    else:
        model = _with_plain_parameters(empty, config, folder, plain, originals, options)
        tensors = {name: read() for name, read in readers.items()}
    with _naming(folder / CARD_FILE):
        parameters = _changed_parameters(model, card, scales)
    for name, stored in described.items():  # what engines read of rounded inputs
        rounding = card.inputs.get(name)
        said = {f"{name}.{part}": value for part, value in layout.input_tensors(rounding).items()}
        same = all(torch.equal(entries[key].read(), value) for key, value in said.items())
        if not same or stored != layout.with_inputs(stored.model_copy(update={"inputs": None}), rounding):
            raise BitassayError(f"{folder}: {CARD_FILE} and the files differ in the inputs of {name}", AGAIN)
    made = Quantization(card.recipe, tensors, parameters, card.inputs, card.passes)
    return with_tensors(model, made, packed=packed)


@contextmanager
def _naming(where: str | Path) -> Iterator[None]:
    """Say in errors which file is wrong."""
    try:
        yield
    except BitassayError as error:
        raise BitassayError(f"{where}: {error.problem}", error.remedy or AGAIN) from error


def _check_parts(parts: storage.Expected, entries: dict[str, Entry], folder: Path) -> None:
    for key, (dtype, shape) in parts.items():
        if key not in entries:
            raise BitassayError(f"{folder}: no file holds {key}", AGAIN)
        entry = entries[key]
        if (entry.dtype, entry.shape) != (dtype, tuple(shape)):
            raise BitassayError(
                f"{entry.file}: {key} is {entry.dtype} {list(entry.shape)}, "
                f"the model and its recipe need {dtype} {list(shape)}",
                AGAIN,
            )


def expected_parts(
    model: PreTrainedModel,
    layout: Layout,
    described: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, int]],
) -> storage.Expected:
    """Return dtype and shape of every part of every matrix, by its name in the folder."""
    pieces, expected = layout.pieces(model), dict[str, Any]()
    for name, stored in described.items():
        rows, columns = shapes[name]
        how = exact_scales(stored) if name in pieces else stored
        for piece in pieces.get(name, [Piece(name, 0, 1)]):
            parts = layout.expected_tensors(how, (rows // piece.of, columns))
            expected |= {f"{piece.name}.{part}": what for part, what in parts.items()}
    return expected


def _read_matrix(
    name: str,
    stored: Stored,
    shape: tuple[int, int],
    layout: Layout,
    entries: dict[str, Entry],
    pieces: list[Piece] | None = None,
) -> QuantizedTensor:
    if pieces is not None:
        size = (shape[0] // len(pieces), shape[1])
        exact = exact_scales(stored)
        parts = [_read_matrix(piece.name, exact, size, layout, entries) for piece in pieces]
        return joined(parts, stored.scheme)
    parts = {part: entries[f"{name}.{part}"].read() for part in layout.expected_tensors(stored, shape)}
    file = entries[f"{name}.{next(iter(parts))}"].file
    for part, value in parts.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise BitassayError(f"{file}: {name}.{part} has values that are NaN or infinite", AGAIN)
    with _naming(f"{file}: {name}"):
        return layout.read_tensor(parts, stored, shape)


def _with_plain_parameters(
    empty: PreTrainedModel,
    config: PretrainedConfig,
    folder: Path,
    plain: dict[str, Entry],
    quantized: set[str],
    options: LoadOptions,
) -> PreTrainedModel:
    """The model with every parameter but the quantized matrices, whose memory is not even touched."""
    expected = empty.state_dict()  # shapes as files have them
    state: dict[str, Any] = {key: entry.read() for key, entry in plain.items()}
    for name in quantized:
        key = f"{name}.weight" if f"{name}.weight" in expected else name.rpartition(".")[0]
        if key not in state:
            state[key] = torch.empty(expected[key].shape, dtype=options.dtype)
    model, report = type(empty).from_pretrained(  # type: ignore[misc]
        None,
        config=config,
        state_dict=state,
        dtype=options.dtype,
        attn_implementation=options.attention,
        ignore_mismatched_sizes=True,  # reported by check_keys, with names
        output_loading_info=True,
    )
    check_keys(report, folder)
    if unused := sorted(report["unexpected_keys"]):
        file = plain[unused[0]].file if unused[0] in plain else folder
        raise BitassayError(f"{file}: {unused[0]} belongs to nothing in the model", AGAIN)
    as_linears(model)
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _input_scales(
    model: PreTrainedModel, recipe: Recipe, plain: dict[str, Entry], folder: Path
) -> dict[str, Tensor]:
    """By what linears divide their inputs, taken out of what is left to be plain parameters."""
    if recipe.smoothing is None or not recipe.smoothing.at_run_time:
        return {}
    shapes = {f"{name}.{INPUT_SCALES}": (linear.in_features,) for name, linear in walk(model).linears.items()}
    _check_parts({name: (model.dtype, shape) for name, shape in shapes.items()}, plain, folder)
    scales = {}
    for name in shapes:
        entry = plain.pop(name)
        scales[name] = entry.read()
        if not (scales[name].isfinite() & (scales[name] > 0)).all():
            raise BitassayError(f"{entry.file}: {name} has values that are not above zero and finite", AGAIN)
    return scales


def _changed_parameters(
    model: PreTrainedModel, card: Card, scales: dict[str, Tensor]
) -> Mapping[str, Tensor]:
    # A tied head has no name of its own among the parameters.
    parameters = dict(model.named_parameters(remove_duplicate=False)) | scales
    if missing := sorted(scales.keys() - set(card.parameters)):
        raise BitassayError(f"parameters: {missing[0]} is not there")
    if unknown := [name for name in card.parameters if name not in parameters]:
        raise BitassayError(f"the model has no parameter {unknown[0]}")
    weights = weights_of(model)
    values = {name: parameters[name].detach() for name in card.parameters}
    if weights is None:
        return values
    read = {name: partial(weights.stored, name) for name in values if name not in scales}
    return Unread(read | {name: partial(scales.__getitem__, name) for name in values if name in scales})


def _check_inputs(card: Card, linears: Mapping[str, nn.Linear]) -> None:
    part = card.recipe.activations
    formats = {name: s.format for name in linears if part is not None and (s := part.scheme_for(name))}
    if {name: rounding.format for name, rounding in card.inputs.items()} != formats:
        raise BitassayError("inputs are not those of the recipe's activations")
    for name, rounding in card.inputs.items():
        if rounding.outliers and max(rounding.outliers) >= linears[name].in_features:
            raise BitassayError(f"inputs of {name}: it has no column {max(rounding.outliers)}")
        if rounding.copy is not None or not 1 <= rounding.copies <= card.recipe.input_copies:
            raise BitassayError(f"inputs of {name}: copies that the recipe has not")


def _check_passes(card: Card, layers: int) -> None:
    """Raise BitassayError for other passes than the recipe asks for, as far as it says."""
    plan, passes = card.recipe.replication, card.passes
    if plan is None or not plan.at_run_time:
        fits = not passes
    else:
        measured = {index: plan.copies for index in passes if 0 <= index < layers}
        known, fitted = plan.known_counts(layers), plan.coefficients == "fitted"
        counts = {index: steps.count for index, steps in passes.items()}
        fits = counts == (measured if known is None else known)
        fits = fits and (fitted or all(steps == plan.steps(steps.count) for steps in passes.values()))
    if not fits:
        raise BitassayError("passes: not those of the recipe's replication")


def _shapes(model: PreTrainedModel, card: Card) -> dict[str, tuple[int, int]]:
    """Return the shapes of the model's matrices and of layers' copies of them, which the card must name."""
    shapes = {name: (view.shape[0], view.shape[1]) for name, view in matrices(model).items()}
    names = [name for name in card.matrices if name in shapes and not is_replica(name)]
    for index, steps in card.passes.items() if card.recipe.coded_replication else ():
        for name in names:
            shapes |= dict.fromkeys(replica_names(model, index, name, steps.count), shapes[name])
    if missing := sorted(name for name in shapes if is_replica(name) and name not in card.matrices):
        raise BitassayError(f"matrices: {missing[0]} is not there")
    if unknown := [name for name in card.matrices if name not in shapes]:
        raise BitassayError(f"the model has no matrix {unknown[0]}")
    return shapes


def _layout(card: Card) -> Layout:
    if card.layout not in LAYOUTS:
        remedy = "install the package that adds the layout, or save the model again"
        raise BitassayError(f"layout: no {card.layout!r}; {suggestion(card.layout, LAYOUTS)}", remedy)
    layout = LAYOUTS[card.layout]
    if max(card.matrices.values()) >= len(card.schemes):
        raise BitassayError("matrices: no such place in schemes")
    if why := next(filter(None, map(layout.matrix_obstacle, card.schemes)), None):
        raise BitassayError(f"schemes: {why}")
    return layout

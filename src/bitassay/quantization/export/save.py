"""Save a quantized model as a folder: `save`.

Of the layouts (`registry.py`) it takes compressed-tensors (`compressed.py`), which vLLM loads, and without
zero points plain transformers too, wherever that holds the model exactly; else our own (`own.py`), which
`bitassay.load` loads. In each, what is not quantized lies beside the codes as ordinary parameters, and
`bitassay.json` says what the folder is.
"""

import itertools
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from bitassay.errors import BitassayError, MissingError
from bitassay.models.identity import identity
from bitassay.models.opened import is_opened, weights_of
from bitassay.models.options import LoadOptions, attention_of
from bitassay.models.source import resolve
from bitassay.models.walk import fused_experts, walk
from bitassay.models.weights import write_weights
from bitassay.quantization.codes.storage import Expected, Stored, description, expected_bytes
from bitassay.quantization.export import plain_load
from bitassay.quantization.export.card import CARD_FILE, Base, Card, hashed_files, read_card
from bitassay.quantization.export.layout import Layout
from bitassay.quantization.export.registry import GROUPED, LAYOUTS, OWN, STANDARD
from bitassay.quantization.export.reload import expected_parts, load_quantized
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import (
    Quantization,
    bits_per_weight,
    quantization_of,
    quantized_weights,
    size_bytes,
)
from bitassay.quantization.runtime.replicas import is_replica
from bitassay.record.files import atomic_folder, write_json
from bitassay.record.hashing import digest_file
from bitassay.record.progress import Progress, silent

MARGIN_BYTES = 2**24  # configuration, tokenizer and file headers


class LayoutError(BitassayError):
    """A layout that was asked for cannot hold what a recipe makes."""


def save(
    model: PreTrainedModel, folder: str | Path, *, layout: str | None = None, progress: Progress = silent
) -> Card:
    """Write a model that `quantize` made, fake or packed, into `folder`, which must not exist or be empty.
    layout: a name in `LAYOUTS`; None takes compressed-tensors where it is exact, else our own; the card says
    which it was. Asked for, compressed-tensors also says that inputs are rounded, which engines do by steps
    of their own. Everything that the recipe left alone is stored in the model's dtype; tokenizer and
    generation settings go along, and `bitassay.json` says what the folder is. Raises BitassayError where the
    layout asked for cannot express a scheme exactly, MissingError where the disk is too small."""
    folder, quantization, base = Path(folder), quantization_of(model), identity(model)
    if quantization is None or not quantization.tensors:
        raise BitassayError(
            "this model is not quantized, so there is nothing to export",
            "bitassay.quantize(model, recipe='w4') first",
        )
    dtype, dtypes = str(model.dtype).removeprefix("torch."), get_args(Card.model_fields["dtype"].annotation)
    if dtype not in dtypes:
        raise BitassayError(f"a checkpoint holds {', '.join(dtypes)}, not {dtype}", f"load it in {dtypes[0]}")
    descriptions = {name: description(tensor) for name, tensor in quantization.tensors.items()}
    chosen, why = choose_layout(model, quantization.recipe, descriptions, layout)
    if why is not None:
        progress(f"{folder}: {why}")
    storing = LAYOUTS[chosen]
    descriptions = {
        name: storing.with_inputs(stored, quantization.inputs.get(name))
        for name, stored in descriptions.items()
    }
    progress(f"packing {len(quantization.tensors)} matrices ({chosen} layout)")
    shapes = {name: tensor.shape for name, tensor in quantization.tensors.items()}
    parts = expected_parts(model, storing, descriptions, shapes)
    others = _other_parameters(model, quantization)
    expected: Expected = parts | {key: (value.dtype, tuple(value.shape)) for key, value in others.items()}
    check_space(folder, expected_bytes(expected))
    weights = quantized_weights(quantization.tensors)
    schemes = tuple(dict.fromkeys(descriptions.values()))
    progress(f"writing {folder}")
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict={"none": torch.empty(0)})  # all but the weights
        original = _original_format(model, storing, descriptions)
        names = _names_in_files(model, expected) if original else {name: name for name in expected}
        named: Expected = {names[name]: what for name, what in expected.items()}
        state = itertools.chain(_parts(model, quantization, storing), _values(model, others))
        write_weights(temporary, named, ((names[name], value) for name, value in state))
        storing.describe(model, quantization, temporary)
        if getattr(model, "tokenizer", None) is not None:
            model.tokenizer.save_pretrained(temporary)  # type: ignore[union-attr]
        card = Card(
            schema_version=1,
            layout=chosen,
            recipe=quantization.recipe,
            schemes=schemes,
            matrices={name: schemes.index(stored) for name, stored in descriptions.items()},
            parameters=tuple(sorted(quantization.parameters)),
            inputs=quantization.inputs,
            passes=quantization.passes,
            base=Base(
                name=base.name,
                origin=base.source.origin,
                weights_digest=base.weights_digest,
                tokenizer_digest=base.tokenizer_digest,
                config_digest=base.config_digest,
            ),
            dtype=dtype,  # type: ignore[arg-type]
            bits_per_weight=bits_per_weight(model),
            stored_bits_per_weight=expected_bytes(parts) * 8 / weights,
            size_bytes=size_bytes(model),
            versions={
                name: version(name) for name in ("bitassay", "compressed-tensors", "transformers", "torch")
            },
            files={path.name: digest_file(path) for path in hashed_files(temporary)},
        )
        for path in hashed_files(temporary):
            path.chmod((temporary / "config.json").stat().st_mode)  # safetensors makes private files
        write_json(temporary / CARD_FILE, card.model_dump(mode="json"))
    return card


def reload_difference(
    model: PreTrainedModel,
    folder: str | Path,
    tokens: Int[Tensor, "batch tokens"],
    *,
    trust_remote_code: bool = False,
) -> float:
    """Return the largest difference between the logits of `model` and of the folder, in the model's dtype: as
    plain transformers loads it where it can, else as `bitassay.load` does, and an opened model a layer at a
    time."""
    card, opened = read_card(Path(folder)), is_opened(model)
    if card is not None and (opened or not LAYOUTS[card.layout].is_plain):
        attention = attention_of(model)
        options = LoadOptions(model.dtype, model.device, attention, trust_remote_code, opened=opened)
        reloaded = load_quantized(resolve(folder), card, options)
    else:
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            device_map=model.device,
            attn_implementation=attention_of(model),
            trust_remote_code=trust_remote_code,
        ).eval()
    with torch.inference_mode():
        return (model(tokens).logits.float() - reloaded(tokens).logits.float()).abs().max().item()


def choose_layout(
    model: PreTrainedModel, recipe: Recipe, matrices: dict[str, Stored], wanted: str | None = None
) -> tuple[str, str | None]:
    """Return `wanted`, or compressed-tensors where it is exact, with zero points as vLLM reads them, else our
    own, with the reason. Raises BitassayError that names what the wanted one cannot hold, or for an unknown
    one."""
    name = wanted or STANDARD
    why = LAYOUTS[name].obstacle(model, recipe, matrices, wanted is not None)
    if wanted is not None and why:
        raise LayoutError(
            f"a {wanted} folder cannot hold {why}",
            "leave out --layout, or --layout bitassay, for a folder that bitassay.load reads",
        )
    if why is None:
        has_zero_points = any(not stored.scheme.symmetric for stored in matrices.values())
        if wanted is None and has_zero_points:
            said = LAYOUTS[GROUPED].obstacle(model, recipe, matrices, False) is None
            return (GROUPED if said else name), None
        return name, None
    return OWN, (
        "in bitassay's own layout, which bitassay.load reads and plain transformers does not: "
        f"a {STANDARD} folder cannot hold {why}"
    )


def _original_format(model: PreTrainedModel, layout: Layout, matrices: dict[str, Stored]) -> bool:
    """Whether tensors get the names that checkpoints of the architecture have, or the model's own. Dense
    experts stay fused: transformers loses those that come one by one beside codes."""
    experts = tuple(f"{name}." for name in fused_experts(model))
    in_codes = bool(layout.pieces(model)) and any(name.startswith(experts) for name in matrices)
    return plain_load.keeps_names(model) and (not experts or in_codes)


def _names_in_files(model: PreTrainedModel, expected: Expected) -> dict[str, str]:
    """Return the names that checkpoints of the architecture have for these tensors, none of which is changed
    but in its name."""
    with torch.device("meta"):
        state = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in expected.items()}
    names = {id(value): name for name, value in state.items()}
    return {names[id(value)]: name for name, value in revert_weight_conversion(model, state).items()}


def _parts(
    model: PreTrainedModel, quantization: Quantization, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    pieces = layout.pieces(model)
    for name, tensor in quantization.tensors.items():
        if name in pieces:
            stored = {
                piece.name: layout.stored_tensors(plain_load.part_of(tensor, piece), None)
                for piece in pieces[name]
            }
        else:
            stored = {name: layout.stored_tensors(tensor, quantization.inputs.get(name))}
        for owner, parts in stored.items():
            yield from ((f"{owner}.{part}", value) for part, value in parts.items())


def _other_parameters(model: PreTrainedModel, quantization: Quantization) -> dict[str, Tensor]:
    """What is stored as it is: all but the quantized matrices, of which fused experts are slices."""
    codes, fused = quantization.tensors, walk(model).experts.items()
    stacks = {key for key, stack in fused if all(f"{key}.{place}" in codes for place in range(len(stack)))}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {
        key
        for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if key in parameters and parameters[key] is parameters.get(source)
    }
    left_out = {*stacks, *tied, *(getattr(model, "_keys_to_ignore_on_save", None) or ())}
    return {
        key: value
        for key, value in model.state_dict().items()
        if not (key.removesuffix(".weight") in codes or key in left_out or is_replica(key))
    }


def _values(model: PreTrainedModel, others: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield them with the values that an opened model has for them."""
    weights = weights_of(model)
    yield from others.items() if weights is None else ((name, weights.in_files(name)) for name in others)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise MissingError where the disk of `folder`, which need not exist yet, has no room for that much."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + MARGIN_BYTES:
        raise MissingError(
            f"{folder}: needs {(needed_bytes + MARGIN_BYTES) / 1e6:.0f} MB, "
            f"{free_bytes / 1e6:.0f} MB are free",
            "free some space or choose another folder",
        )

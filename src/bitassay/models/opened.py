"""A checkpoint that is opened, not loaded: a model on the meta device that reads its weights when they are
needed, and forgets them afterwards.

    with present(model, "model.layers.3"):     # or any other module, by its full name
        ...                                    # the weights below it are in memory

A loaded model has all its weights all the time, and for it `present` does nothing. Whoever goes through a
model a layer at a time says `present`, and needs the memory of one layer where the model was opened. A
forward of an opened model reads each decoder layer, the embedding and the head as it comes to them.

A model that was made of an opened one by changing some weights is an opened model too. Where the weights of
an opened model come from is in `opened_weights.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.empty import empty_model
from bitassay.models.identity import attach
from bitassay.models.opened_weights import Weights, read_around
from bitassay.models.options import LoadOptions
from bitassay.models.walk import module_name
from bitassay.models.weights import Entry, check_files
from bitassay.record.memory import return_large_blocks

T = TypeVar("T")


def open_plain(
    folder: Path,
    config: PretrainedConfig,
    options: LoadOptions,
    entries: dict[str, Entry] | None = None,
    made: Collection[str] = (),
) -> PreTrainedModel:
    """Open a folder whose weights are plain numbers; or the `entries` of one that are, where the matrices
    `made` will be changes. Raises BitassayError where they are not those that the configuration describes."""
    if getattr(config, "quantization_config", None) is not None:
        raise BitassayError(f"{folder}: holds codes, which are read as a whole", "more --memory")
    model = empty_model(
        config, options.dtype, attention=options.attention, trust_remote_code=options.trust_remote_code
    )
    model.config.dtype, model.config.name_or_path = options.dtype, str(folder)
    return_large_blocks()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for part in model.modules():  # a model is where its weights will be
        if isinstance(part, PreTrainedModel):
            kind, fixed = type(part), property(lambda _: torch.device(options.device))
            part.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": fixed})
    # What the files do not hold, such as rotary frequencies, is computed as loading does it.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model._move_missing_keys_from_meta_to_device(set(), {"": options.device}, None, None)  # type: ignore[arg-type]
    model._initialize_missing_keys(is_quantized=False)
    weights = Weights(model, folder, check_files(folder) if entries is None else entries, options, made)
    attach(model, weights=weights)
    weights.read_in_forwards()
    return model.eval().requires_grad_(False)


def is_opened(model: nn.Module) -> bool:
    """Return whether the weights of a model are read when they are needed."""
    return weights_of(model) is not None


def weights_of(model: nn.Module) -> "Weights | None":
    """Return where an opened model finds its weights; None for a loaded one."""
    return vars(model).get("weights")


@contextmanager
def present(model: nn.Module, *modules: str) -> Iterator[None]:
    """Have the weights of these modules, by their full names, in memory within the context."""
    if (weights := weights_of(model)) is None:
        yield
        return
    with weights.holding([name for module in modules for name in weights.below(module)]):
        yield


def parameter_of(model: nn.Module, name: str) -> Tensor:
    """Return the value of a parameter of a loaded or opened model."""
    weights = weights_of(model)
    return model.get_parameter(name).detach() if weights is None else weights.value(name)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a model another parameter of that name; an opened one has it there when it is needed."""
    if (weights := weights_of(model)) is not None:
        weights.changes[name] = lambda _: parameter
        return
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner).register_parameter(key, parameter)


def change_parameter(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Give a model a function of a parameter in its place; an opened one computes it when it is needed."""
    if (weights := weights_of(model)) is not None:
        before = weights.changes.get(name)
        weights.changes[name] = lambda stored: change(stored() if before is None else before(stored))
        return
    put_parameter(model, name, nn.Parameter(change(parameter_of(model, name)), requires_grad=False))


def reading_forward(model: nn.Module, module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a decoder layer; of an opened model one that reads the layer's weights by itself,
    wherever it is called, in place of the layer's hooks."""
    if (weights := weights_of(model)) is None:
        return module.forward
    unit = module_name(model, module)
    weights.by_itself.add(unit)
    return partial(read_around, weights, unit, module.forward)


class Unread(Mapping[str, T]):
    """Values by name that are made each time they are asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], T]]):
        self.readers = readers

    def __getitem__(self, name: str) -> T:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

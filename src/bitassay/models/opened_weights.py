"""Where the weights of an opened model (`opened.py`) come from: `Weights`.

What is read is what loading reads: transformers renames, joins and casts the tensors of the files, here those
of one module at a time. Of a changed weight it is known by which function it is made of what the files hold.
"""

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from bitassay.errors import BitassayError
from bitassay.models.identity import attach
from bitassay.models.options import LoadOptions
from bitassay.models.transposed import stores_transposed
from bitassay.models.walk import decoder_layers, module_name
from bitassay.models.weights import Entry, check_finite, check_keys

Change = Callable[[Callable[[], Tensor]], Tensor]  # from what reads the stored value to the changed value
HALVES = (torch.float16, torch.bfloat16)


class Weights:
    """The weights of an opened model, by name. changes: how those are made that are not the files' own.
    units: the names of weights by the module that reads them in a forward, a decoder layer or a module
    outside of the layers that has weights of its own; layers: which of them are layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        entries: dict[str, Entry],
        options: LoadOptions,
        made: Collection[str] = (),
    ):
        self.model, self.folder, self.entries, self.device = model, folder, entries, options.device
        # Weights are read in `dtype`; `narrow` has what was 16 bits wide before `widen`.
        self.dtype, self.narrow = model.dtype, dict[str, torch.dtype]()
        self.changes: dict[str, Change] = {}
        self.by_itself = set[str]()  # units whose forwards no hook reads for
        self.holds: Counter[str] = Counter()
        # What models have in memory that were made of one opened model.
        self.held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self.empty = {name: _get(model, name) for name in model.state_dict()}
        self.mapping: list[Any] = list(get_model_conversion_mapping(model))
        self.keys, unknown = self._keys()
        # A tied weight is read under the name that the files have.
        stored = {id(self.empty[name]): name for name in self.keys}
        self.origin = {name: stored.get(id(value), name) for name, value in self.empty.items()}
        made = {*(f"{name}.weight" for name in made), *(name.rpartition(".")[0] for name in made)}
        missing = {name for name, origin in self.origin.items() if origin not in self.keys} - made
        report = _Report(missing, unknown)
        model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type]
        check_keys(vars(report), folder)
        attach(model, _weight_conversions=[way for way in self.mapping if way.was_used()])
        prefix = module_name(model, decoder_layers(model))
        self.layers = [f"{prefix}.{index}" for index in range(len(decoder_layers(model)))]
        self.units: dict[str, list[str]] = {}
        for name in self.empty:
            unit = name.rpartition(".")[0]
            if name.startswith(f"{prefix}."):
                unit = f"{prefix}.{name.removeprefix(f'{prefix}.').partition('.')[0]}"
            self.units.setdefault(unit, []).append(name)

    def _keys(self) -> tuple[dict[str, list[str]], set[str]]:
        """The files' names of each weight, and of what is no weight of the model."""
        state = self.model.state_dict()
        renamings = [way for way in self.mapping if isinstance(way, WeightRenaming)]
        converters = [way for way in self.mapping if isinstance(way, WeightConverter)]
        targets = {source: way.target_patterns for way in converters for source in way.source_patterns}
        keys: dict[str, list[str]] = {}
        unknown: set[str] = set()
        for key in self.entries:
            name, joined = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if name not in state and key in state:
                name, joined = key, None
            if name not in state:
                unknown.add(name)
                continue
            first, *others = targets[joined] if joined is not None else [name]
            for made in (name, *(name.replace(first, other) for other in others)):
                keys.setdefault(made, []).append(key)
        return keys, unknown

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weights":
        other = copy.copy(self)
        memo[id(self)] = other
        other.model = copy.deepcopy(self.model, memo)
        other.changes, other.by_itself, other.holds = dict(self.changes), set(self.by_itself), Counter()
        return other

    def widen(self) -> None:
        """Have weights of 16 bits in fp32 from now on; what was one weight stays one."""
        if not any(value.dtype in HALVES for value in self.empty.values()):
            return
        self.held, self.narrow = weakref.WeakValueDictionary(), dict(self.narrow)
        wide: dict[int, Tensor] = {}
        for name, value in list(self.empty.items()):
            if value.dtype in HALVES:
                self.narrow[name] = value.dtype
                new = wide.setdefault(id(value), torch.empty_like(value, dtype=torch.float32))
                wide[id(value)] = _put(self.model, name, new)
        self.empty = {name: _get(self.model, name) for name in self.empty}

    def separate(self, name: str) -> None:
        """Make a weight that was tied to another one a weight of its own."""
        value = self.empty[name]
        if any(value is other for key, other in self.empty.items() if key != name):
            self.empty = {**self.empty, name: _put(self.model, name, torch.empty_like(value))}

    def below(self, module: str) -> list[str]:
        """Return the names of the weights of a module and of all in it."""
        return [name for name in self.empty if name.startswith(f"{module}.")]

    def read_in_forwards(self) -> None:
        """Read the weights of each decoder layer, and of what lies beside the layers, in every forward."""
        for unit in self.units:
            part = self.model.get_submodule(unit)
            part.register_forward_pre_hook(partial(_take_before, self, unit), with_kwargs=True)
            part.register_forward_hook(partial(_drop_after, self, unit), always_call=True)

    @contextmanager
    def waiting(self, wait: Callable[[str], None]) -> Iterator[None]:
        """Call `wait(unit)` in this thread before the weights of a unit are read in a forward."""
        _thread.wait = wait
        try:
            yield
        finally:
            del _thread.wait

    @contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """Have these weights in memory within the context."""
        self.take(names)
        try:
            yield
        finally:
            self.drop(names)

    def take(self, names: Collection[str]) -> None:
        """Bring weights into memory that are not there yet."""
        wanted = [name for name in names if not self.holds[name]]
        self.holds.update(names)
        values = self.read({self.origin[name] for name in wanted if name not in self.changes})
        for name in wanted:
            change = self.changes.get(name)
            value = values[self.origin[name]] if change is None else change(partial(self.stored, name))
            self.held[self._known(name)] = _put(self.model, name, value)

    def _known(self, name: str) -> str:
        """A name for a weight that no other weight has, of this model and of those made of the same one."""
        return f"{name} of {id(self)}" if name in self.changes else self.origin[name]

    def drop(self, names: Collection[str]) -> None:
        """Forget weights that nobody else has taken."""
        self.holds.subtract(names)
        for name in names:
            if not self.holds[name]:
                _put(self.model, name, self.empty[name])

    def value(self, name: str) -> Tensor:
        """Return a weight as the model has it."""
        if name not in self.empty:  # added since, and in memory
            return _get(self.model, name).detach()
        with self.holding([name]):
            return _get(self.model, name).detach()

    def in_files(self, name: str) -> Tensor:
        """Return a weight as the model's state dict has it."""
        value = self.value(name)
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return value.T if stores_transposed(owner) and value.ndim == 2 else value

    def stored(self, name: str) -> Tensor:
        """Return a weight as the files have it, in the model's dtype; some memory, where they have none."""
        if self.origin[name] not in self.keys:
            return torch.empty_like(self.empty[name], device=self.device)
        return self.read({self.origin[name]})[self.origin[name]]

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Read weights that are not in memory, without putting them into the model. Raises BitassayError for
        values that are not finite, and for another shape than the configuration says."""
        held = {name: value for name in names if (value := self.held.get(name)) is not None}
        return held | self._read([name for name in names if name not in held])

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        keys = {key for name in names for key in self.keys[name]}
        if not keys:
            return {}
        model, dtype = self.model, self.dtype
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self.mapping,
            ignore_mismatched_sizes=True,
        )
        # Transformers puts what it reads into the model, and with it what is cut from the same tensors.
        touched = [name for name, parts in self.keys.items() if not keys.isdisjoint(parts)]
        before = {name: _get(model, name) for name in touched}
        turned = {name for name in touched if stores_transposed(model.get_submodule(name.rpartition(".")[0]))}
        turned = {name for name in turned if before[name].ndim == 2}
        for name in touched:
            _put(model, name, self.empty[name].T if name in turned else self.empty[name])
        try:
            dtypes = {} if config.dtype_plan else self._dtypes(touched)
            lazy: dict[str, Any] = {key: _Lazy(self.entries[key], dtypes.get(key)) for key in sorted(keys)}
            info, _ = convert_and_load_state_dict_in_model(model, lazy, config)
            mismatched = [*info.mismatched_keys, *([key] for key in info.conversion_errors)]
            check_keys({"mismatched_keys": mismatched}, self.folder)
            values = {name: _get(model, name).detach() for name in names}
        finally:
            for name, value in before.items():
                _put(model, name, value)
        check_finite(values.items(), self.folder)
        for name in values.keys() & self.narrow.keys():
            values[name] = values[name].to(self.narrow[name]).float()
        return {name: value.T if name in turned else value for name, value in values.items()}

    def _dtypes(self, names: Collection[str]) -> dict[str, torch.dtype]:
        """By key, the dtype that transformers casts a tensor of the files to, where it does."""
        return {
            key: wanted
            for name in names
            for key in self.keys[name]
            if (wanted := self.empty[name].dtype).is_floating_point
            and (stored := self.entries[key].dtype) is not None
            and stored.is_floating_point
        }


class _Report:
    """What transformers calls missing and unexpected."""

    def __init__(self, missing: set[str], unexpected: set[str]):
        self.missing_keys, self.unexpected_keys = missing, unexpected


class _Lazy:
    """A tensor of a file, which transformers reads where it slices it, and would cast to that dtype."""

    def __init__(self, entry: Entry, dtype: torch.dtype | None):
        self.entry, self.dtype = entry, dtype

    def __getitem__(self, _: Any) -> Tensor:
        return self.entry.read(self.dtype)


_thread = threading.local()


def _take_before(
    weights: Weights, unit: str, _module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    if any(isinstance(value, Tensor) and value.is_meta for value in (*positional, *named.values())):
        raise BitassayError(
            f"{type(weights.model).__name__} looks at weights before they are used, so that they cannot be "
            "read a layer at a time",
            "more --memory, in which the whole model fits",
        )
    if unit not in weights.by_itself:
        _take(weights, unit)


def _take(weights: Weights, unit: str) -> None:
    if (wait := getattr(_thread, "wait", None)) is not None:
        wait(unit)
    weights.take(weights.units[unit])


def _drop_after(weights: Weights, unit: str, _module: nn.Module, _arguments: Any, _out: Any) -> None:
    if unit not in weights.by_itself:
        weights.drop(weights.units[unit])


def read_around(
    weights: Weights, unit: str, forward: Callable[..., Any], *positional: Any, **named: Any
) -> Any:
    """Return what a forward returns, with the weights of its unit in memory meanwhile."""
    _take(weights, unit)
    try:
        return forward(*positional, **named)
    finally:
        weights.drop(weights.units[unit])


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value = module._parameters.get(key, module._buffers.get(key))
    assert value is not None
    return value


def _put(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Put a value in the place of a parameter or buffer; return what is there then."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if key in module._buffers:
        module._buffers[key] = value
        return value
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
    module._parameters[key] = parameter
    return parameter

"""The state of a descent in a work folder, from which an interrupted one goes on.

    tune-STEP-LAYER.safetensors    positions, grids and moments of a layer
    tune.safetensors               the step, and what belongs to no layer: it makes a state complete

The state before it stays until then, so that a kill at any moment loses the steps since the last one alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitassay.errors import BitassayError
from bitassay.quantization.solvers.descent import Adam
from bitassay.record.run import RunFolder

KEEP_STEPS = 16
NAME = "tune"


class Kept:
    """Keeps every KEEP_STEPS steps what is learned in `folder` (None: nowhere). layers: the parameters of
    each, learned or not; a part holds those of one layer."""

    def __init__(self, folder: RunFolder | None, layers: Mapping[int, Sequence[nn.Parameter]]):
        self.folder = folder
        self.layer_of = {parameter: layer for layer, own in layers.items() for parameter in own}

    def keep(self, step: int, learned: list[nn.Parameter], adam: Adam) -> None:
        """Keep the state after that step, where it is time to."""
        if self.folder is None or step % KEEP_STEPS:
            return
        for layer, parameters in self._layers(learned):
            with _in_memory(layer, parameters, adam, changed=False):
                state = _state(parameters, adam)
                if layer is None:
                    self.folder.write_tensors(NAME, state | {"step": torch.tensor(step)})
                else:
                    self.folder.write_tensors(_part(step, layer), state)
        for path in (self.folder.path / "parts").glob(f"{NAME}-*.safetensors"):
            if not path.name.startswith(_part(step)):
                path.unlink()

    def restore(self, learned: list[nn.Parameter], adam: Adam) -> int:
        """Put the last complete state back in place, and return its step; 0 where there is none. Raises
        BitassayError where it is of other parameters."""
        if self.folder is None or not self.folder.has_tensors(NAME):
            return 0
        step = int(self.folder.read_tensors(NAME).get("step", torch.tensor(0)))
        for layer, parameters in self._layers(learned):
            name = NAME if layer is None else _part(step, layer)
            kept = self.folder.read_tensors(name)
            with _in_memory(layer, parameters, adam, changed=True):
                for key, value in _state(parameters, adam).items():
                    if key not in kept or kept[key].shape != value.shape:
                        raise BitassayError(
                            f"{self.folder.path}: {name} is damaged at {key}",
                            "remove this folder and run the same command again",
                        )
                    value.copy_(kept[key])
        return step

    def _layers(self, learned: list[nn.Parameter]) -> Iterator[tuple[int | None, dict[int, nn.Parameter]]]:
        """Yield each layer and its parameters by their numbers, and last those of none."""
        parts: dict[int | None, dict[int, nn.Parameter]] = {}
        for place, parameter in enumerate(learned):
            parts.setdefault(self.layer_of.get(parameter), {})[place] = parameter
        rest = parts.pop(None, {})
        yield from parts.items()
        yield None, rest


@contextmanager
def _in_memory(
    layer: int | None, parameters: Mapping[int, nn.Parameter], adam: Adam, changed: bool
) -> Iterator[None]:
    moments = [moments[each] for each in parameters.values() for moments in (adam.mean, adam.square)]
    adam.shelf.enter(layer)
    with adam.shelf.lent(*moments, changed=changed):
        yield
    for parameter in parameters.values() if changed else ():
        adam.shelf.changed(parameter)


def _state(parameters: Mapping[int, nn.Parameter], adam: Adam) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for place, parameter in parameters.items():
        state[f"{place}.value"] = parameter.detach()
        state[f"{place}.mean"], state[f"{place}.square"] = adam.mean[parameter], adam.square[parameter]
    return state


def _part(step: int, layer: int | None = None) -> str:
    return f"{NAME}-{step:06}-" + ("" if layer is None else f"{layer:04}")

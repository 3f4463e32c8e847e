"""Tensors that lie in a file while nobody needs them.

    shelf.add(layer, tensors)      # written, and their memory given back
    shelf.enter(layer)             # read again; those of the layer before go back

Whoever holds such a tensor holds it still: its memory comes and goes, itself, its shape and its place in an
autograd graph stay. So a model that is learned can be larger than memory. What is read and written goes
through the file cache of the system, which keeps what fits and counts as nobody's memory. The file has no
name, and is gone with the process.
"""

import ctypes
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bitassay.record.files import explained


class Shelf:
    """Tensors in a file in `folder`, in groups of which one at a time is in memory; None: all stay there."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.places: dict[Tensor, int] = {}
        self.groups: dict[int, list[Tensor]] = {}
        self.inside: int | None = None
        self.moved: set[Tensor] = set()
        self.end = 0
        if folder is not None:
            with explained(folder):
                self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (as long as self)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self.places

    def add(self, group: int, tensors: Collection[Tensor]) -> None:
        """Put tensors onto the shelf, each with memory of its own, as a group."""
        if self.folder is not None:
            self.groups[group] = list(dict.fromkeys(tensors))
            self.keep(self.groups[group])

    def keep(self, tensors: Collection[Tensor]) -> None:
        """Put tensors onto the shelf that belong to no group; `lent` gives them back for a while."""
        for tensor in tensors if self.folder is not None else ():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "it shares its memory"
            self.places[tensor] = self.end
            self.end += tensor.nbytes
            self._put(tensor, changed=True)

    def enter(self, group: int | None) -> None:
        """Have this group in memory, and no other; None: none."""
        if self.inside == group:
            return
        for tensor in self.groups.get(self.inside, ()) if self.inside is not None else ():
            self._put(tensor, tensor in self.moved)
        self.moved.clear()
        self.inside = group
        for tensor in self.groups.get(group, ()) if group is not None else ():
            self._take(tensor)

    def changed(self, tensor: Tensor) -> None:
        """Say that a tensor of the group in memory is not what the file has."""
        if tensor in self.places:
            self.moved.add(tensor)

    @contextmanager
    def lent(self, *tensors: Tensor, changed: bool = True) -> Iterator[None]:
        """Have tensors of no group in memory within the context. changed: to be written afterwards."""
        known = [tensor for tensor in tensors if tensor in self.places]
        for tensor in known:
            self._take(tensor)
        try:
            yield
        finally:
            for tensor in known:
                self._put(tensor, changed)

    def _take(self, tensor: Tensor) -> None:
        assert self.folder is not None
        tensor.untyped_storage().resize_(tensor.nbytes)
        here = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        view = _view(here)
        with explained(self.folder):
            self.file.seek(self.places[tensor])
            while len(view):
                read = self.file.readinto(view)  # type: ignore[attr-defined]  # a raw file
                assert read, "a file ends before its tensors"
                view = view[read:]
        if here is not tensor:
            tensor.data.copy_(here)

    def _put(self, tensor: Tensor, changed: bool) -> None:
        assert self.folder is not None
        if changed:
            here = tensor.detach().cpu()
            view = _view(here)
            with explained(self.folder):
                self.file.seek(self.places[tensor])
                while len(view):
                    view = view[self.file.write(view) :]
        tensor.untyped_storage().resize_(0)


def _view(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor on the host, as long as that is there. (By way of numpy, the tensor could
    not be resized any more.)"""
    storage = tensor.untyped_storage()
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


IN_MEMORY = Shelf()

"""Hooks and forwards that are there for a while, and gone after it whatever happens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register the hooks of these handles, one as each is drawn, and remove them at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def reading(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[RemovableHandle]:
    """Register hooks, for `hooked`, that call `see(name, x)` with what a module is about to read."""

    def show(name: str, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(name, arguments[0])

    for name, module in modules.items():
        yield module.register_forward_pre_hook(partial(show, name))


@contextmanager
def forwarded(changes: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another forward, and at the end what they had: their class's, or one of their own."""
    with ExitStack() as stack:
        for module, forward in changes:
            stack.enter_context(patch.object(module, "forward", forward))
        yield

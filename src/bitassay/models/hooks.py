"""Hooks and forwards that are there for a while, and gone after it whatever happens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register the hooks of these handles, one as each is drawn, and remove them at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def forwarded(changes: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another forward, and at the end what they had: their class's, or one of their own."""
    with ExitStack() as stack:
        for module, forward in changes:
            own = module.__dict__.get("forward")
            stack.callback(_restore, module, own)
            module.forward = forward
        yield


def _restore(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = own

"""Compute a model in the next higher precision for a while: what its rounding in its own dtype is measured
against.

A model in 16 bits computes in fp32 within `higher_precision`, one in fp32 in fp64. The weights keep their
values; only sums, products and activations are no longer rounded to the model's dtype. Weights are converted
one decoder layer at a time, just before it runs, and put back behind it, so that no copy of the model exists.
Norms and the output head are converted all the while: models ask for the dtype of these from outside. Models
with codes dequantize them as they do in any dtype.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.engines.segments import PassedBy
from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.options import attention_of
from bitassay.models.precision import widest
from bitassay.models.walk import decoder_layers

HIGHER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@contextmanager
def higher_precision(model: PreTrainedModel) -> Iterator[None]:
    """Make forwards of `model` compute in the next higher precision within the context. A model for which its
    device has none (fp64, or fp32 on MPS) is left as it is. Raises BitassayError where it does not compute in
    that precision."""
    own = model.dtype
    dtype = HIGHER.get(own)
    if dtype is None or (dtype == torch.float64 and widest(model.device) != dtype):
        yield
        return
    layers = list(dict.fromkeys(decoder_layers(model)))
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module not in inside]
    embeddings = [
        module for module in outside if type(module) is nn.Embedding
    ]  # others may scale what they read
    single = [module for module in outside if _has_tensors(module) and module not in embeddings]

    def convert(tensor: Tensor, low: torch.dtype = model.dtype) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == low else tensor

    with ExitStack() as stack:
        stack.enter_context(_attention_of_any_dtype(model))
        stack.enter_context(_experts_of_any_dtype(model, dtype))
        stack.enter_context(hooked(_converted_output(module, dtype) for module in embeddings))
        for layer in layers:
            stack.enter_context(_converted_while_running(layer, convert))
        stack.enter_context(_converted(single, convert))
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BitassayError(
                f"{type(model).__name__} does not compute in {str(dtype).removeprefix('torch.')}, from which "
                f"the rounding in {str(own).removeprefix('torch.')} is measured: {error}",
                "verify it in bfloat16" if own == torch.float32 else "it cannot be verified yet",
            ) from error


def _has_tensors(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_floating_point() for tensor in tensors)


def _converted_output(module: nn.Module, dtype: torch.dtype) -> Any:
    return module.register_forward_hook(lambda _module, _arguments, output: output.to(dtype))


@contextmanager
def _converted(modules: Iterable[nn.Module], convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give each of `modules` converted tensors within the context, and what it had behind it."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in modules:
            before.append((module, _state(module)))
            _convert_own(module, convert)
        yield
    finally:
        while before:
            _restore(*before.pop())


@contextmanager
def _converted_while_running(layer: nn.Module, convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Convert a layer, and what it reads, for each of its forwards."""
    running = ExitStack()

    def begin(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if isinstance(layer.forward, PassedBy):
            return None
        running.enter_context(_converted(list(layer.modules()), convert))
        return tuple(map(_moved(convert), arguments)), {
            name: _moved(convert)(value) for name, value in options.items()
        }

    def end(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        running.close()

    begun = layer.register_forward_pre_hook(begin, with_kwargs=True)
    ended = layer.register_forward_hook(end, always_call=True)
    with hooked((begun, ended)), running:
        yield


def _moved(convert: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return convert(value)
        return tuple(map(move, value)) if type(value) is tuple else value

    return move


def _state(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds: its attributes, with the tables of parameters and buffers copied."""
    tables = {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers")}
    return {**module.__dict__, **tables}


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    hooks = {name: table for name, table in module.__dict__.items() if "_hooks" in name}
    module.__dict__.clear()
    module.__dict__.update(state | hooks)


def _convert_own(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Convert what `module` itself holds into new tensors, as `module.to` does in place."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module._apply(convert, recurse=False)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@contextmanager
def _experts_of_any_dtype(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Multiply expert by expert in fp64, for which grouped products do not exist."""
    experts = getattr(model.config, "_experts_implementation", None)
    if dtype != torch.float64 or experts in (None, "eager"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(experts)


@contextmanager
def _attention_of_any_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Use an attention that computes in every dtype where the model's own knows 16 bits alone."""
    attention = attention_of(model)
    if not attention.startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
